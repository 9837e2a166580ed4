"""Datasets of TFDS, of its catalogue or prepared before, without TensorFlow; what does not work is one line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

from llm_jax.config import to_json
from llm_jax.data import store
from llm_jax.data.config import DataConfig, TfdsSource
from llm_jax.data.corpus import Document, open_corpus
from llm_jax.data.errors import DataError
from llm_jax.data.prepare import documents, is_prepared, prepare
from llm_jax.data.splits import SPLITS
from tests import data_texts
from tests.conftest import ROOT, Start
from tests.data_texts import BPE, VOCAB

TEXTS = [data_texts.sentences(i, 10) for i in range(60)]


def read(source: TfdsSource) -> list[str]:
    return [d.text for d in open_corpus(source).read() if isinstance(d, Document)]


def told(source: TfdsSource) -> str:
    """The line that a source fails with."""
    with pytest.raises(DataError) as caught:
        read(source)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that somebody has prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    examples = ({"key": str(i), "text": text} for i, text in enumerate(TEXTS))
    store.build(store.Documents({"train": store.shards(examples, store.Meter(1, lambda n: None))}, folder))
    return folder / "documents" / "1.0.0"


def test_a_prepared_directory_becomes_rows(directory: Path, tmp_path: Path) -> None:
    source = TfdsSource(dataset=str(directory))
    data = DataConfig(source=source, dir=str(tmp_path), seq_len=32, validation_share=0.1, test_share=0.1)
    made = prepare(data, BPE, VOCAB, 0, report=lambda line: None)
    stored = [text for split in SPLITS for _, text in documents(made, split)]
    assert sorted(stored) == sorted(TEXTS)
    assert all(made.rows_info["splits"][split]["rows"] for split in SPLITS)


def test_a_split_may_be_a_slice(directory: Path) -> None:
    assert read(TfdsSource(dataset=str(directory), split="train[10:20]")) == TEXTS[10:20]
    assert read(TfdsSource(dataset=str(directory), split="train[:50%]")) == TEXTS[:30]
    one, other = (open_corpus(TfdsSource(dataset=str(directory), split=s)).version for s in ("train", "train[:50%]"))
    assert one != other


def test_a_name_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TFDS's mock reads one record at a time only: a MagicMock does not pass itself to what it does not know.
    monkeypatch.setattr(
        "tensorflow_datasets.testing.mocking._getitems",
        lambda numbers, generator: [generator[number] for number in numbers],
    )
    source = TfdsSource(dataset="lm1b", data_dir=str(tmp_path))
    with tfds.testing.mock_data(num_examples=50):
        found = open_corpus(source)
        assert found.name == "lm1b"
        assert len(list(found.read())) == 50


def test_what_does_not_exist_is_one_line(directory: Path, tmp_path: Path) -> None:
    assert told(TfdsSource(dataset="lm1bb")) == ("data.source.dataset = lm1bb: no such dataset; did you mean lm1b?")
    assert told(TfdsSource(dataset="qqqqq")) == (
        "data.source.dataset = qqqqq: no such dataset; neither in the TFDS catalogue nor a folder"
    )
    assert told(TfdsSource(dataset=str(directory), text_field="txt")) == (
        f"data.source.dataset = {directory} has no field 'txt' (there is: key, text); set data.source.text_field"
    )
    assert told(TfdsSource(dataset="mnist", text_field="label")).endswith(
        "field 'label' is no text; set data.source.text_field"
    )
    assert f"data.source.dataset = {directory}: " in told(TfdsSource(dataset=str(directory), split="dev"))
    assert f"data.source.dataset = {tmp_path}: " in told(TfdsSource(dataset=str(tmp_path)))


def test_what_is_stored_for_tensorflow_is_one_line(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert told(TfdsSource(dataset=str(tmp_path))) == (
        f"data.source.dataset = {tmp_path} is stored as tfrecord, which needs TensorFlow to read;"
        " prepare it with file_format='array_record'"
    )


class Offline(tfds.core.GeneratorBasedBuilder):
    """A dataset of the catalogue whose server does not answer."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        raise ConnectionError("cannot reach the server\nafter 10 attempts")

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ()


class Reachable(Offline):
    """A dataset of the catalogue as they should be."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((i, {"text": text}) for i, text in enumerate(TEXTS))


def test_a_dataset_of_the_catalogue_is_prepared_by_tfds_first(tmp_path: Path) -> None:
    source = TfdsSource(dataset="reachable", data_dir=str(tmp_path / "tfds"))
    data = DataConfig(source=source, dir=str(tmp_path / "data"), seq_len=32, validation_share=0.1, test_share=0.1)
    assert not is_prepared(data, BPE, VOCAB, 0)
    assert not (tmp_path / "tfds").exists(), "looking must not download"
    made = prepare(data, BPE, VOCAB, 0, report=lambda line: None)
    assert sorted(text for split in SPLITS for _, text in documents(made, split)) == sorted(TEXTS)
    assert is_prepared(data, BPE, VOCAB, 0)
    assert made.text.parent.name.startswith("reachable-")


class WithTensorflow(Offline):
    """A dataset of the catalogue that reads its files with TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield 0, {"text": tensorflow.io.gfile.GFile("text").read()}


def test_a_failed_download_is_one_line(tmp_path: Path) -> None:
    line = told(TfdsSource(dataset="offline", data_dir=str(tmp_path)))
    assert line == "data.source.dataset = offline: ConnectionError: cannot reach the server"


def test_a_preparation_that_needs_tensorflow_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = told(TfdsSource(dataset="with_tensorflow", data_dir=str(tmp_path)))
    assert line.startswith(
        "data.source.dataset = with_tensorflow: its preparation needs TensorFlow, which llm_jax does without"
    )
    assert capfd.readouterr().out == ""


TRAP = """
import sys
from llm_jax.config import from_json
from llm_jax.data import loader
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.data.prepare import prepare
made = prepare(from_json(DataConfig, sys.argv[1]), TokenizerConfig(), 400, 0, report=lambda line: None)
loader.open_rows(made, "train", 0)
print("tensorflow" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["files", "tfds"])
def test_tensorflow_is_not_imported_where_it_is_installed(
    kind: str, directory: Path, tmp_path: Path, start: Start
) -> None:
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("__version__ = '2.19.0'\n")
    data = data_texts.config(data_texts.write_files(tmp_path / "texts", n=20), into=tmp_path / "data")
    if kind == "tfds":
        data = data.model_copy(update={"source": TfdsSource(dataset=str(directory))})
    done = start("-c", TRAP, to_json(data), env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}).wait()
    assert done.stdout == "False\n", done.stderr
    assert "tensorflow" not in sys.modules
