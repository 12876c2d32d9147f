"""Settings that cannot be run: one line on stderr and exit code 2, before any long work."""

from tests.process import of_code

CODE = """
    import os, sys
    from truepose_jax import train
    from truepose_jax.flags import train as told
    from truepose_jax.runtime.cli import run_with_config

    for flag in sys.argv[2:]:  # a process each, that of JAX not yet started
        if os.fork() == 0:
            sys.argv[1:] = [f"--workdir={sys.argv[1]}", "--config=configs/demo.py", flag]
            run_with_config(train.main, told)
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status), file=sys.stderr, flush=True)
"""
WRONG = {
    "--config.modle.size=(64, 48)": "modle",
    "--config.batch_size=many": "many",
    "--config.mesh.data=3": "mesh",
    "--config.model.attention=cudnn": "cudnn runs on a GPU alone, and this is a CPU; take auto",
}


def test_bad_settings_get_one_line_and_code_2(tmp_path):
    _, _, errors = of_code(CODE, tmp_path, *WRONG).finish()
    lines = errors.splitlines()
    assert lines[1::2] == ["2"] * len(WRONG), errors
    for said, word in zip(lines[::2], WRONG.values(), strict=True):
        assert word in said
