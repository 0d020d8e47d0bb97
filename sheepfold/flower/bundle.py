"""The app bundle that Flower wants of every run: a constant that names our installed modules and has no code in it."""

from functools import cache

CONFIG = "sheepfold"
"""The one key of a run's configuration: a JSON text with the job's name."""

PROJECT = f"""\
[project]
name = "sheepfold"
version = "1.0.0"
description = "Names the modules of an installed sheepfold; holds no code"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "sheepfold"

[tool.flwr.app.components]
serverapp = "sheepfold.flower.apps:server_app"
clientapp = "sheepfold.flower.apps:client_app"

[tool.flwr.app.config]
{CONFIG} = ""
"""


@cache
def bundle() -> bytes:
    """Return the bundle, the same bytes everywhere."""
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files({"pyproject.toml": PROJECT.encode()})[0]
