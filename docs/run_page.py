"""Runs the Python of a page and writes what each block prints behind it: `python docs/run_page.py docs/PAGE.md`.

A block's output stands in a `text` block behind the comment "printed, by ...", which the page has wherever it wants to
show one. All blocks of a page share their names, as if they were typed one after another.
"""

import argparse
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

_BLOCK = r"```python\n(?P<code>.*?)^```\n"
_OUTPUT = r"(?P<mark>\n<!-- printed, by .*? -->\n)(?:\n```text\n.*?^```\n)?"


def executed(text: str, name: str) -> str:
    """The text of a page with the outputs of its blocks as they are now. `name` stands in tracebacks."""
    namespace: dict[str, object] = {"__name__": "__main__"}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * text.count("\n", 0, match.start("code")) + match["code"], name, "exec"), namespace)
        block = f"```python\n{match['code']}```\n"
        return f"{block}{match['mark']}\n```text\n{printed.getvalue()}```\n" if match["mark"] else block

    return re.sub(f"{_BLOCK}(?:{_OUTPUT})?", run, text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    for page in parser.parse_args().pages:
        page.write_text(executed(page.read_text(), str(page)))
