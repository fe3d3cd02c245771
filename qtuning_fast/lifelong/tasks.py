from dataclasses import dataclass


@dataclass(frozen=True)
class Examples:
    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    name: str
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    source: str
