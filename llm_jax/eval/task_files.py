"""Tasks as data: a YAML file names a kind and its jsonl, and both are validated before anything is scored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import pydantic
import yaml
from annotated_types import Ge, MinLen

from llm_jax.config import Config, ConfigError, from_json

SUFFIXES = (".yaml", ".yml")


class BitsPerByte(Config):
    """The texts' negative log-likelihood in bits, divided by their bytes; every byte is scored once."""

    kind: Literal["bits_per_byte"]
    """The kind of task."""
    data: str
    """The jsonl file, seen from the YAML file: {"text": ...} a line."""


class MinimalPairs(Config):
    """Which of two sentences is likelier (BLiMP, Warstadt et al. 2020)."""

    kind: Literal["minimal_pairs"]
    """The kind of task."""
    data: str
    """The jsonl file: {"sentence_good": ..., "sentence_bad": ..., "UID": ...} a line; UID may be missing."""


class Choosing(Config):
    """A question and several answers, of which one is right."""

    data: str
    """The jsonl file: {"question": ..., "choices": [...], "answer": 0} a line; answer is the right choice's place."""
    examples: str | None = None
    """A jsonl file of the same form, of which the first `shots` lines stand before each question with their answers."""
    shots: Annotated[int, Ge(0)] = 0
    """How many examples."""
    prompt: str = "{question}"
    """What is shown for a question; {question} stands for it."""
    delimiter: str = " "
    """Stands between the prompt and a choice."""
    separator: str = "\n\n"
    """Stands after each example."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt = {self.prompt!r}: must contain {{question}}")
        if self.shots and self.examples is None:
            raise ValueError(f"shots = {self.shots}: needs examples, the file they are taken from")
        return self


class MultipleChoice(Choosing):
    """Whether the right answer is the likeliest: by its sum of nats, and by nats a byte."""

    kind: Literal["multiple_choice"]
    """The kind of task."""


class Calibration(Choosing):
    """How far confidence and accuracy are apart (ECE, Naeini et al. 2015)."""

    kind: Literal["calibration"]
    """The kind of task."""
    bins: Annotated[int, Ge(1)] = 10
    """Equal parts of [0, 1] in which confidence and accuracy are compared."""


class Cloze(Config):
    """The last word of a text, given all before it (LAMBADA, Paperno et al. 2016)."""

    kind: Literal["cloze"]
    """The kind of task."""
    data: str
    """The jsonl file: {"text": ...} a line."""


class Generation(Config):
    """Whether the likeliest continuation, token by token, is the answer; white space around both is left out."""

    kind: Literal["generation"]
    """The kind of task."""
    data: str
    """The jsonl file: {"prompt": ..., "answer": ...} a line."""
    stop: tuple[str, ...] = ("\n",)
    """Strings before which a continuation ends."""
    max_tokens: Annotated[int, Ge(1)] = 32
    """Tokens of a continuation at most."""


class CrowsPairs(Config):
    """Stereotypes by the paper's metric, which needs a masked model (CrowS-Pairs, Nangia et al. 2020)."""

    kind: Literal["crows_pairs"]
    """The kind of task."""
    data: str
    """The jsonl file: {"sent_more": ..., "sent_less": ..., "bias_type": ...} a line; bias_type may be left out."""


class CrowsPairsWholeSentence(Config):
    """The same pairs by the likelihood of whole sentences, as lm-evaluation-harness has it; another metric."""

    kind: Literal["crows_pairs_whole_sentence"]
    """The kind of task."""
    data: str
    """The jsonl file, as for crows_pairs."""


Task = (
    BitsPerByte
    | MinimalPairs
    | MultipleChoice
    | Calibration
    | Cloze
    | Generation
    | CrowsPairs
    | CrowsPairsWholeSentence
)


class TaskFile(Config):
    """What a YAML file holds, under one name."""

    task: Annotated[Task, pydantic.Field(discriminator="kind")]
    """The task."""


class Record(Config):
    """A line of a jsonl file; published files have more fields than are needed."""

    model_config = pydantic.ConfigDict(extra="ignore")


class TextRecord(Record):
    """A text."""

    text: Annotated[str, MinLen(1)]
    """The text."""


class ClozeRecord(Record):
    """A text of two words or more."""

    text: str
    """The text."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.text.split()) < 2:
            raise ValueError(f"text = {self.text!r}: must have two words at least; the last is asked for")
        return self


class PairRecord(Record):
    """BLiMP's format."""

    sentence_good: Annotated[str, MinLen(1)]
    """The sentence that should be likelier."""
    sentence_bad: Annotated[str, MinLen(1)]
    """The other one."""
    UID: str | None = None
    """The paradigm, by which results are told too."""


class ChoiceRecord(Record):
    """A question and its choices."""

    question: str
    """The question."""
    choices: Annotated[tuple[Annotated[str, MinLen(1)], ...], MinLen(2)]
    """What to choose from."""
    answer: Annotated[int, Ge(0)]
    """The right one's place, from 0."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer = {self.answer}: must be less than {len(self.choices)}, the number of choices")
        return self


class AnswerRecord(Record):
    """A prompt and the continuation that is right."""

    prompt: str
    """The beginning."""
    answer: Annotated[str, MinLen(1)]
    """What should follow."""


class StereotypeRecord(Record):
    """CrowS-Pairs' columns."""

    sent_more: Annotated[str, MinLen(1)]
    """The sentence that stereotypes more."""
    sent_less: Annotated[str, MinLen(1)]
    """The one that does less."""
    bias_type: str | None = None
    """What it is about, by which results are told too."""


class Read(NamedTuple):
    """A task under its file's name, its records (of the class that its kind has), and its examples."""

    name: str
    task: Task
    records: Sequence[Any]
    examples: Sequence[ChoiceRecord]


def read_tasks(paths: Sequence[str]) -> list[Read]:
    """The tasks of YAML files, and of folders of some, in that order; those of a folder by name.

    Raises ConfigError with a line for each mistake, the file and its line in front.
    """
    found = [file for path in paths for file in _files(Path(path))]
    names = [file.stem for file in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--tasks: two files are called {name}; results are told by that name, so rename one")
    return [_read(file) for file in found]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise ConfigError(f"--tasks {path}: no .yaml file is in this folder")
        return found
    if not path.is_file():
        raise ConfigError(f"--tasks {path}: no such file or folder")
    return [path]


def _read(path: Path) -> Read:
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or 'cannot be read'}") from None
    task = _validated(TaskFile, json.dumps({"task": content}, default=str), str(path), root="task").task
    examples: Sequence[ChoiceRecord] = ()
    if isinstance(task, Choosing) and task.shots and task.examples is not None:
        examples = records(path.parent / task.examples, ChoiceRecord)[: task.shots]
        if len(examples) < task.shots:
            raise ConfigError(f"{path}: shots = {task.shots}, and {task.examples} has {len(examples)} examples")
    return Read(path.stem, task, records(path.parent / task.data, _record_of(task)), examples)


def _record_of(task: Task) -> type[Record]:
    match task:
        case BitsPerByte():
            return TextRecord
        case MinimalPairs():
            return PairRecord
        case MultipleChoice() | Calibration():
            return ChoiceRecord
        case Cloze():
            return ClozeRecord
        case Generation():
            return AnswerRecord
        case CrowsPairs() | CrowsPairsWholeSentence():
            return StereotypeRecord


R = TypeVar("R", bound=Record)
C = TypeVar("C", bound=Config)


def records(path: Path, cls: type[R]) -> list[R]:
    """The lines of a jsonl file, blank ones left out. Raises ConfigError where one is wrong, or there is none."""
    lines = _text(path).split("\n")
    found = [_validated(cls, line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"{path}: is empty; a line is a JSON object with {', '.join(cls.model_fields)}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _validated(cls: type[C], text: str, where: str, root: str = "") -> C:
    """The text as a cls; mistakes are told by the place of the text, without the name it has got here."""
    try:
        return from_json(cls, text)
    except ConfigError as error:
        lines = [line.removeprefix(f"{root}: ").removeprefix(f"{root}.") for line in error.lines]
        raise ConfigError(*(f"{where}: {line}" for line in lines)) from None
