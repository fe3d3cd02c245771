"""Is what is installed what the lock says?

    python requirements/check.py

Compares every package of the environment that runs it with lock.txt, torch.txt and data.txt, both ways. It ends with 1
and a line for each difference. With TORCH= of one's own, torch and its libraries are expected to differ.
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
OURS = {"pip", "qtuning-fast"}


def pinned(file: str, environment: dict[str, str] | None = None) -> dict[str, Version]:
    """The version of each package of a requirements file on this machine, or in an environment of other markers."""
    versions: dict[str, Version] = {}
    for line in (HERE / file).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        [version] = [each.version for each in requirement.specifier if each.operator == "=="]
        if name in versions:
            raise ValueError(f"{file} holds {name} twice: {versions[name]} and {version}")
        versions[name] = Version(version)
    return versions


def differences() -> list[str]:
    """A line for each package that is missing, of another version, or not in the lock."""
    locked = pinned("lock.txt") | pinned("data.txt")
    of_torch = pinned("torch.txt")  # of these a build for CPUs brings torch alone
    installed = {canonicalize_name(each.metadata["Name"]): Version(each.version) for each in distributions()}
    found = [f"{name} {version} is not installed" for name, version in locked.items() if name not in installed]
    for name, version in sorted(installed.items()):
        wanted = (locked | of_torch).get(name)
        if wanted is None and name not in OURS:
            found.append(f"{name} {version} is not in the lock")
        elif wanted is not None and version.public != wanted.public:  # a build is 2.13.0+cpu where the lock says 2.13.0
            found.append(f"{name} is {version}, in the lock {wanted}")
    return found


if __name__ == "__main__":
    lines = differences()
    print("\n".join(lines) or "The environment is the one of the lock.")
    sys.exit(bool(lines))
