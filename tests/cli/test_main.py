"""The command line's frame, in processes of its own: what each ending looks like to the shell."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import qwen2_jax
from qwen2_jax.cli import main, parser

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.smoke

# A command `probe` beside the real ones, which does what the test asks in one line of Python.
PROBE = """
import sys, types
from qwen2_jax.cli import main, output, parser
from qwen2_jax.errors import UserError
probe = types.ModuleType("qwen2_jax.cli.probe")
def add_parser(commands):
    command = commands.add_parser("probe", help="for tests")
    command.add_argument("--code", required=True)
    command.add_argument("--output")
    command.set_defaults(run=run)
def run(args):
    exec(args.code, globals() | {"args": args})
    return 0
probe.add_parser = add_parser
sys.modules["qwen2_jax.cli.probe"] = probe
parser.COMMANDS = (*parser.COMMANDS, "probe")
sys.exit(main.entry())
"""


@pytest.fixture(scope="module")
def probe(process_env):
    def run(*argv: object, **options):
        options = {"env": process_env, "text": True, "capture_output": True, "stdin": subprocess.DEVNULL,
                   "timeout": 60} | options
        return subprocess.run([sys.executable, "-c", PROBE, *map(str, argv)], **options)

    return run


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text


def test_version(run_cli):
    done = run_cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qwen2-jax {qwen2_jax.__version__}\n", "")


def test_help_names_every_command(run_cli):
    done = run_cli("--help")
    assert done.returncode == 0 and done.stderr == ""
    for command in parser.COMMANDS:
        assert f"\n    {command} " in done.stdout


def test_without_a_command_the_help_goes_to_stderr(run_cli):
    done = run_cli()
    assert (done.returncode, done.stdout) == (2, "")
    assert "commands:" in done.stderr


def test_parsing_imports_nothing_heavy():
    code = ("import sys; from qwen2_jax.cli.parser import build_parser; build_parser(); "
            "heavy = {'jax', 'numpy', 'flax', 'orbax', 'safetensors', 'tokenizers'} & set(sys.modules); "
            "sys.exit(f'imported {heavy}' if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv, message", [
    (["prob", "--code", "1"], "command 'prob' does not exist, did you mean probe?"),
    (["probe", "--coed", "1"], "unknown flag '--coed', did you mean --code?"),
    (["probe", "--cod", "1"], "unknown flag '--cod', did you mean --code?"),     # and never an abbreviation
    (["probe", "--code=1", "--zzz=2"], "unknown flag '--zzz'; "),
    (["--debog", "probe", "--code", "1"], "unknown flag '--debog', did you mean --debug"),
    (["probe"], "the following arguments are required: --code"),
    (["probe", "--code"], "argument --code: expected one argument"),
    (["probe", "--code", "1", "stray"], "unknown argument 'stray'"),
])
def test_a_mistyped_command_line_is_one_line_and_2(argv, message, monkeypatch, capsys):
    module = types.ModuleType("qwen2_jax.cli.probe")
    module.__dict__["add_parser"] = lambda commands: commands.add_parser("probe").add_argument("--code", required=True)
    monkeypatch.setitem(sys.modules, "qwen2_jax.cli.probe", module)
    monkeypatch.setattr(parser, "COMMANDS", (*parser.COMMANDS, "probe"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = main.entry(argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert one_line(err).startswith("qwen2-jax: error: ") and message in err


def test_a_users_error_is_one_line_and_2(probe):
    done = probe("probe", "--code", "raise UserError('rope_theta is -1,\\n  need more than 0')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qwen2-jax: error: rope_theta is -1, need more than 0\n"


def test_a_bug_is_1_with_a_hint_and_no_traceback(probe):
    done = probe("probe", "--code", "{}['gone']")
    assert done.returncode == 1
    assert "bug: KeyError" in done.stderr and "--debug" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", [["--debug", "probe", "--code", "1/0"], ["probe", "--code", "1/0", "--debug"]])
def test_debug_shows_the_traceback_on_either_side(probe, argv):
    done = probe(*argv)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_out_of_memory_is_the_users_to_mend(probe):
    host = probe("probe", "--code", "raise MemoryError")
    device = probe("probe", "--code", "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')")
    for done in (host, device):
        assert done.returncode == 2 and "out of memory" in one_line(done.stderr)


@pytest.mark.parametrize("argv", ["info LONG", "generate --prompt x --model LONG", "convert LONG dst --to orbax"])
def test_a_name_longer_than_the_file_system_takes(argv, capsys):
    argv = argv.replace("LONG", 300 * "x").split()
    assert main.entry([*argv, "--no-compilation-cache"]) == main.USER_ERROR
    assert capsys.readouterr().err == f"qwen2-jax: error: File name too long: {300 * 'x'}\n"


def test_a_full_disk_under_stdout(probe):
    with open("/dev/full", "w") as full:
        done = probe("probe", "--code", "print('result')", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 2
    assert one_line(done.stderr) == "qwen2-jax: error: No space left on device\n"


def test_a_closed_pipe_is_quiet(process_env):
    code = "for i in range(10**6): print('line', i)"
    with subprocess.Popen([sys.executable, "-c", PROBE, "probe", "--code", code], env=process_env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.parametrize("sent, status, stderr", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")])
def test_an_interruption_keeps_what_is_finished(process_env, tmp_path, sent, status, stderr):
    target = tmp_path / "out.jsonl"
    code = ("import time\n"
            "with output.records(args.output) as file:\n"
            "    file.write('{\"id\": 1}\\n{\"id\": 2}\\n{\"id\"')\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", PROBE, "probe", "--output", str(target), "--code", code],
                          env=process_env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir()) != [target]      # not under its own name while it grows
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert stderr in err and "Traceback" not in err and "2 finished records" in err
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == '{"id": 1}\n{"id": 2}\n'


def test_our_warnings_are_lines_and_other_peoples_are_silent(probe):
    code = ("import warnings, logging\n"
            "warnings.warn_explicit('field x is null', UserWarning, 'a.py', 1, module='qwen2_jax.checkpoint')\n"
            "warnings.warn_explicit('noise', UserWarning, 'b.py', 1, module='orbax.x')\n"
            "logging.getLogger('absl').warning('noise')\n"
            "logging.getLogger('jax._src.dispatch').warning('noise')")
    done = probe("probe", "--code", code)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "qwen2-jax: warning: field x is null\n"


def test_text_that_the_locale_cannot_show_is_written_as_utf8(probe, process_env):
    env = process_env | {"PYTHONIOENCODING": "ascii"}
    done = probe("probe", "--code", "print('héllo 你好 \\udc80')", env=env, text=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "héllo 你好 ?\n"
