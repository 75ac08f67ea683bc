"""The settings of a model that commands are given: a family's defaults or a run's, with ``--pipeline.KEY VALUE`` on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from flowalign import config as configuration
from flowalign.config import ConfigError, Plugin
from flowalign.run_config import CONFIGS, load_config

PREFIX = "--pipeline."
_KIND = Annotated[Any, Plugin("pipelines")]


def override(settings: Any, fields: Sequence[str], *, said_by: Mapping[str, str]) -> Any:
    """Change settings of a pipeline by ``--pipeline.KEY VALUE`` arguments, as `flowalign train` does those of a run.

    Another ``type`` begins with the defaults of that family, for the same model.

    Args:
        settings: What is changed.
        fields: The arguments.
        said_by: Keys that the command takes in another way, and which.

    Returns:
        The new settings.

    Raises:
        ConfigError: If a key is unknown, a value does not fit, or the command takes the key in another way.
    """
    if not fields:
        return settings
    for word in fields:
        key = word.partition("=")[0].removeprefix(PREFIX).replace("-", "_").split(".")[0]
        if word.startswith("--") and not word.startswith(PREFIX):
            raise ConfigError(
                f"{word}: unknown option; settings of the model are --pipeline.KEY VALUE, for example --pipeline.dtype bfloat16"
            )
        if word.startswith(PREFIX) and key in said_by:
            raise ConfigError(f"{word}: this command takes it as {said_by[key]}; give that instead")
    before = configuration.encode(settings, _KIND)
    raw = configuration.override({"pipeline": before}, fields)
    if raw["pipeline"]["type"] != before["type"]:
        raw = configuration.override({"pipeline": {"model": settings.model}}, fields)
    return configuration.decode(_KIND, raw["pipeline"], "pipeline")


def settings_for(model: str, fields: Sequence[str] = (), *, said_by: Mapping[str, str]) -> Any:
    """Return the settings of a model, or those of a run's configuration, with arguments on top; see `override`.

    Args:
        model: Folder, hub id or "shapes"; or a run's configuration, a YAML file or the name of a shipped one.
        fields: ``--pipeline.KEY VALUE`` arguments.
        said_by: Keys that the command takes in another way.
    """
    # Loaded here, and by its module's name, because the families load diffusers.
    from flowalign.pipelines import choose

    is_shipped = (CONFIGS / f"{model}.yaml").is_file() and not Path(model).exists()
    is_run = is_shipped or (Path(model).suffix in (".yaml", ".yml") and Path(model).is_file())
    return override(load_config(model).pipeline if is_run else choose.settings_of(model), fields, said_by=said_by)
