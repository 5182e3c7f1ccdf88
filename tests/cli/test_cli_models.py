"""`hydraserve models`."""

from __future__ import annotations

import pytest

from hydraserve.cli.models import parameters
from hydraserve.models import BASE_MODELS


def test_lists_every_name_with_its_id_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    from hydraserve.cli.main import main

    assert main(["models"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["demo"][-1] == "135M"
    for model in BASE_MODELS:
        assert rows[model.name] == [model.name, model.hub_id, parameters(model.billions)]


@pytest.mark.parametrize(("billions", "text"), [(0.135, "135M"), (0.494, "494M"), (6.74, "6.7B"), (70.6, "70.6B")])
def test_sizes_are_written_as_model_names_write_them(billions: float, text: str) -> None:
    assert parameters(billions) == text
