"""Scripts by which shells complete: every command and option is in them, and bash runs its own."""

import shutil
import subprocess
import sys

import pytest

COMMANDS = ["demo", "inspect", "decode", "convert", "encode", "verify", "bench", "warmup", "completion"]

ASK = """
source /dev/stdin
COMP_WORDS=({words} "{last}") COMP_CWORD={at}
_shtab_mxfp4np
echo ${{COMPREPLY[@]}}
"""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_have_commands_and_options(command, shell):
    status, out, err = command("completion", shell)
    assert (status, err) == (0, "")
    for word in (*COMMANDS, "transpose", "bfloat16", "compressed-tensors"):
        assert word in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "last", "expected"),
    [
        (["mxfp4np"], "", COMMANDS),
        (["mxfp4np"], "de", ["demo", "decode"]),
        (["mxfp4np", "decode", "--dtype"], "", ["bfloat16", "float16", "float32"]),
        (["mxfp4np", "convert", "demo"], "--dr", ["--drop", "--dry-run"]),
        (["mxfp4np", "inspect"], "mod", ["model.safetensors"]),
    ],
)
def test_bash_completes(command, tmp_path, words, last, expected):
    (tmp_path / "model.safetensors").touch()
    script = command("completion", "bash")[1]
    ask = ASK.format(words=" ".join(words), last=last, at=len(words))
    done = subprocess.run(["bash", "-c", ask], input=script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(expected)


def test_without_shtab_the_message_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert refused("completion", "bash").endswith("python -m pip install 'mxfp4np[completion]'")
