"""The base of every group of settings: immutable, and strict about unknown names."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings, kept beside the code that it configures; `config` composes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
