"""What every section of a run's configuration is: a frozen, strict pydantic model. Imports no jax."""

import pydantic

from llm_jax.exit_codes import USAGE, Failure


class ConfigError(Failure, ValueError):
    """Mistakes of the user's, each told in one line: the path, the value and the fix."""

    exit_code = USAGE


class Config(pydantic.BaseModel):
    """One section of a run: frozen, no unknown fields, no silent conversions; a field's docstring is its help."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
