"""A reader of Prometheus' text format 0.0.4 that accepts nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"'
SAMPLE = re.compile(rf"({NAME})(?:{{({LABEL}(?:,{LABEL})*)}})? (\S+)")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


@dataclass
class Sample:
    suffix: str
    labels: dict[str, str]
    value: float


@dataclass
class Family:
    kind: str
    samples: list[Sample] = field(default_factory=list)

    def value(self, suffix: str = "", **labels: str) -> float:
        """The one sample with this suffix and these labels."""
        (value,) = [
            sample.value
            for sample in self.samples
            if sample.suffix == suffix and sample.labels == labels
        ]
        return value


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def parse_metrics(text: str) -> dict[str, Family]:
    """The families by name. Fails where HELP, TYPE, names, values or their order are wrong."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    name = kind = ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert re.fullmatch(NAME, name)
            assert name not in families, f"{name} comes twice"
            kind = ""
        elif line.startswith("# TYPE "):
            _, _, typed, kind = line.split(" ")
            assert typed == name
            assert kind in ("counter", "gauge", "histogram")
            families[name] = Family(kind)
        else:
            families[name].samples.append(parse_sample(line, name, kind))
    for family in families.values():
        keys = [(s.suffix, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert family.samples
        assert len(set(keys)) == len(keys), "a sample comes twice"
    return families


def parse_sample(line: str, name: str, kind: str) -> Sample:
    match = SAMPLE.fullmatch(line)
    assert match, line
    assert match[1].startswith(name), line
    suffix = match[1].removeprefix(name)
    assert suffix in SUFFIXES.get(kind, ("",)), line
    assert kind != "counter" or name.endswith("_total"), line
    labels = {key: unescape(value) for key, value in re.findall(LABEL, match[2] or "")}
    return Sample(suffix, labels, float(match[7]))
