"""Documents of a TFDS dataset: of the catalogue, downloaded and prepared when needed, or of a prepared directory."""

import contextlib
import difflib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from llm_jax.data import store
from llm_jax.data.config import TfdsSource
from llm_jax.data.errors import DataError

Texts = Iterator[tuple[str, bytes]]


def open_tfds(source: TfdsSource) -> tuple[str, str, int, Callable[[], Texts]]:
    """(name, version, rough bytes, reader of (key, text)); downloads nothing before it is read.

    Raises DataError for an unknown dataset, split or field, and for what only TensorFlow can read.
    """
    where = f"data.source.dataset = {source.dataset}"
    is_folder = Path(source.dataset).expanduser().is_dir()
    builder = _directory(source, where) if is_folder else _catalogue(source, where)
    features = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict) or source.text_field not in features:
        there = ", ".join(sorted(features)) if isinstance(features, tfds.features.FeaturesDict) else "no named features"
        raise DataError(f"{where} has no field {source.text_field!r} (there is: {there}); set data.source.text_field")
    if not isinstance(features[source.text_field], tfds.features.Text):
        raise DataError(f"{where}: field {source.text_field!r} is no text; set data.source.text_field")

    def texts() -> Texts:
        with _one_line(where):
            # TFDS prints a banner where TensorFlow is missing; its progress bars are on stderr and stay.
            with contextlib.redirect_stdout(io.StringIO()):
                if not is_folder:
                    builder.download_and_prepare(file_format="array_record")
                records = builder.as_data_source(split=source.split)  # pyright: ignore[reportCallIssue]
            for number, example in enumerate(store.read_records(records)):
                text = example[source.text_field]
                yield f"{number:012}", text.encode() if isinstance(text, str) else text

    # A dataset of the catalogue is told by its version; its size is not known before it has been downloaded.
    size = str(builder.info.dataset_size) if is_folder else ""
    version = f"{builder.info.full_name} {source.split} {source.text_field} {size}"
    return builder.info.name, version, builder.info.dataset_size or 0, texts


def _directory(source: TfdsSource, where: str) -> tfds.core.DatasetBuilder:
    with _one_line(where):
        builder = tfds.builder_from_directory(builder_dir=Path(source.dataset).expanduser())
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        kind = builder.info.file_format.value if builder.info.file_format else "an unknown format"
        raise DataError(
            f"{where} is stored as {kind}, which needs TensorFlow to read; prepare it with file_format='array_record'"
        )
    return builder


def _catalogue(source: TfdsSource, where: str) -> tfds.core.DatasetBuilder:
    name = source.dataset.split("/")[0].split(":")[0]
    names = tfds.list_builders(with_community_datasets=False)
    if name not in names:
        import tensorflow_datasets.text  # noqa: F401  registers the rest of the text datasets; takes a second

        names = tfds.list_builders(with_community_datasets=False)
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}?" if close else "neither in the TFDS catalogue nor a folder"
        raise DataError(f"{where}: no such dataset; {hint}")
    with _one_line(where):
        return tfds.builder(source.dataset, data_dir=source.data_dir, file_format="array_record")


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Whatever TFDS raises becomes one line; the warnings of each of a download's attempts are left out."""
    urllib3 = logging.getLogger("urllib3.connectionpool")
    level = urllib3.level
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the builders are other people's programs
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "tensorflow" in reason.lower().replace("tensorflow_datasets", ""):
            reason = f"its preparation needs TensorFlow, which llm_jax does without ({reason})"
        raise DataError(f"{where}: {reason}") from error
    finally:
        urllib3.setLevel(level)
