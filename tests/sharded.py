"""Runs a script on ranks that share its weights among them (FSDP 2), on CPUs: torchrun tests/sharded.py SCRIPT [FLAG ...]

accelerate shards on GPUs only, so it is told that these ranks are some."""
import runpy
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

begin = Accelerator.__init__


def begin_on_shards(self, *args, **kwargs):
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


Accelerator.__init__ = begin_on_shards
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
