"""docs/settings.md is what the settings classes say, and every setting is explained."""

import pytest
from pydantic_settings import BaseSettings

from cdc.config import Settings as CdcSettings
from conductor.config import Settings as ConductorSettings
from tools.settings_page import PAGE, descriptions, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `python -m tools.settings_page`"
    assert "Undefined" not in page()


@pytest.mark.parametrize("settings", [CdcSettings, ConductorSettings])
def test_every_setting_is_explained(settings: type[BaseSettings]) -> None:
    assert set(settings.model_fields) == set(descriptions(settings))
