"""Write lock.txt and torch.txt: the newest versions that go together, for every Python and platform.

    UV=path/to/uv python requirements/lock.py [--keep]

They hold what setup.py asks for and what lock.in adds. torch.txt has torch and its libraries for CUDA, which a build of
torch brings along as it needs them; lock.txt has everything else, in the versions that this torch wants. At the end
every version must have a wheel for each Python and platform: set-up compiles nothing.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = ("dev", "docs", "triton")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
OF_TORCH = re.compile(r"(torch|nvidia-|cuda-)")


def compiled(*arguments: str) -> None:
    """Run `uv pip compile` on the newest macOS that torch has wheels for."""
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    command = [os.environ["UV"], "pip", "compile", "--quiet", "--no-header", "--no-annotate", *arguments]
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep what is locked; add what is new")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.txt")
        if keep:
            whole.write_text((HERE / "lock.txt").read_text() + (HERE / "torch.txt").read_text())
        sources = ["setup.py", "requirements/lock.in", *(f"--extra={extra}" for extra in EXTRAS)]
        how = ["--universal", f"--python-version={PYTHONS[0]}", *([] if keep else ["--upgrade"])]
        compiled(*sources, *how, f"--output-file={whole}")
        for python in PYTHONS:
            for platform in PLATFORMS:
                target = [f"--python-version={python}", f"--python-platform={platform}"]
                locked = [str(whole), "requirements/data.txt", "--no-deps", "--only-binary=:all:"]
                compiled(*locked, *target, f"--output-file={os.devnull}")
        lines = [line for line in whole.read_text().splitlines() if not line.startswith("#")]
    for file, of_torch in (("lock.txt", False), ("torch.txt", True)):
        chosen = [line for line in lines if bool(OF_TORCH.match(line)) == of_torch]
        (HERE / file).write_text("\n".join(["# Written by `make lock`; requirements/lock.py says how.", *chosen, ""]))
    print(f"{len(lines)} packages, each with a wheel for Python {', '.join(PYTHONS)} on {', '.join(PLATFORMS)}")


if __name__ == "__main__":
    main()
