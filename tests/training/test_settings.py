"""Settings that cannot be run: one line on stderr and exit code 2, before any long work."""

from tests.process import starts

WRONG = {
    "--config.modle.size=(64, 48)": "modle",
    "--config.batch_size=many": "many",
    "--config.mesh.data=3": "mesh",
    "--config.model.attention=cudnn": "cudnn runs on a GPU alone, and this is a CPU; take auto",
}


def test_bad_settings_get_one_line_and_code_2(tmp_path):
    ends = starts("truepose_jax.train", *([f"--workdir={tmp_path}", "--config=configs/demo.py", flag] for flag in WRONG))
    for (code, _, errors), word in zip(ends, WRONG.values(), strict=True):
        assert code == 2 and word in errors and errors.count("\n") == 1, errors
