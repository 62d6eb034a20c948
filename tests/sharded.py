"""What each rank does for test_sharded.py: torchrun --nproc_per_node 2 tests/sharded.py RUNS.json

RUNS.json: a list of {"script", "flags", "sharded", "env"}. All scripts run in the same two
processes, whole and sharded (FSDP 2), because starting processes takes longer than the runs. A run
that fails leaves its traceback in RUNS.json.<number>.<rank>.

accelerate shards on GPUs only, so a sharded run says that these ranks are GPUs."""
import faulthandler
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

HANGS_AFTER = 280  # seconds: a rank that waits for one that will not come ends, and says where
begin, leave = Accelerator.__init__, torch.distributed.destroy_process_group
end = os._exit


def begin_on_shards(self, *args, **kwargs):
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.distributed.destroy_process_group = lambda *args: None  # the scripts share it
os._exit = sys.exit  # a run that is refused ends, the next one starts
file, environment = sys.argv[1], dict(os.environ)
for number, run in enumerate(json.loads(Path(file).read_text())):
    os.environ.clear()
    os.environ.update({**environment, **run["env"]})
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    Accelerator.__init__ = begin_on_shards if run["sharded"] else begin
    sys.argv = [run["script"], *run["flags"]]
    try:
        runpy.run_path(run["script"], run_name="__main__")
    except (Exception, SystemExit):
        Path(f"{file}.{number}.{os.environ['RANK']}").write_text(traceback.format_exc())
leave()
end(0)  # torch may abort as it frees the groups of several runs: end here
