"""Check the links of the pages, and set the line numbers of those that lead to code:

    python docs/links.py            # one sentence per broken link
    python docs/links.py --write    # sets the numbers that have moved

A link to code is [`gae`](../ppo.py#L353): its text is the qualified name of a function, class or
method of that file, or a piece of code or comment that is on exactly one of its lines.
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""
    ^```.*?^```                                     # a block of code has no links,
    | \[ ((?:`[^`]*` | [^][`])*) \] \( ([^()\s]+) \)   # [text](target),
    | (?:src|srcset|href) = "([^"\s]+)"             # <img src="target">,
    | `[^`\n]*`                                     # nor has code in a sentence
    """, re.MULTILINE | re.DOTALL | re.VERBOSE)


def find_anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    anchors = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page), re.MULTILINE):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        copies = sum(re.fullmatch(rf"{slug}(-\d+)?", anchor) is not None for anchor in anchors)
        anchors.append(f"{slug}-{copies}" if copies else slug)
    return anchors


def find_names(node, prefix=""):
    """Yield the qualified name and the line of each function, class and method."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, child.lineno
            yield from find_names(child, f"{prefix}{child.name}.")


def find_lines(code, text):
    """Return the numbers of the lines that define the name `text` or hold the piece `text`."""
    named = [line for name, line in find_names(ast.parse(code)) if name == text]
    lines = code.splitlines()
    return named or [number for number, line in enumerate(lines, 1) if text in line]


def check(page, text, target):
    """Return what is wrong with a link (None: nothing), and the target that it should have."""
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    if "://" in target or target.startswith("mailto:"):
        return None, target
    if not file.exists():
        return f"{path} does not exist", target
    if anchor and file.suffix == ".md":
        known = find_anchors(file.read_text())
        return None if anchor in known else f"{file.name} has no heading #{anchor}", target
    if anchor and (file.suffix != ".py" or not re.fullmatch(r"L\d+", anchor)):
        return f"#{anchor} is neither a heading of a page nor a line of code", target
    if not anchor:
        return None, target
    piece = " ".join(text.split()).strip("`")
    lines = find_lines(file.read_text(), piece)
    if len(lines) != 1:
        found = f"is on {len(lines)} lines of {file.name}"
        return f"`{piece}` {found}; name a function or a piece that is on one", target
    right = f"{path}#L{lines[0]}"
    moved = f"`{piece}` is on line {lines[0]}; python docs/links.py --write sets the number"
    return (None if target == right else moved), right


def check_page(page, write=False):
    """Return a sentence per broken link of a page; with `write`, set line numbers first."""
    text, broken = page.read_text(), []

    def visit(match):
        label, target = match[1] or "", match[2] or match[3]
        if target is None:
            return match[0]
        problem, right = check(page, label, target)
        if problem and not (write and right != target):
            broken.append(f"{page}: [{label}]({target}): {problem}")
        return match[0].replace(target, right)

    fixed = LINK.sub(visit, text)
    if write and fixed != text:
        page.write_text(fixed)
    return broken


def main(*arguments):
    pages = [Path(argument) for argument in arguments if argument != "--write"]
    if not pages:
        docs = [path for path in ROOT.glob("docs/**/*") if path.suffix in (".md", ".ipynb")]
        pages = [ROOT / "README.md", *sorted(docs)]
    broken = [line for page in pages for line in check_page(page, "--write" in arguments)]
    sys.exit("\n".join(broken) or None)


if __name__ == "__main__":
    main(*sys.argv[1:])
