"""Settings that cannot be run: one line on stderr and exit code 2, before any long work."""

import pytest

from tests.training.test_killed import run


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--config.modle.size=(64, 48)", "modle"),
        ("--config.batch_size=many", "many"),
        ("--config.mesh.data=3", "mesh"),
        ("--config.model.attention=cudnn", "cudnn runs on a GPU alone, and this is a CPU; take auto"),
    ],
)
def test_bad_settings_get_one_line_and_code_2(tmp_path, flag, word):
    code, _, errors = run(tmp_path, flag)
    assert code == 2, errors
    assert word in errors and len(errors.strip().splitlines()) == 1
