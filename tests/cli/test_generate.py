"""`qwen2-jax generate`: results on stdout, everything else on stderr, nothing lost whatever happens."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time

import pytest

from qwen2_jax.cli import model_flags
from qwen2_jax.serve import lm as serve_lm

FIELDS = ["prompt", "text", "token_ids", "finish_reason", "prompt_tokens"]
GREEDY = ("--temperature", "0")


@pytest.fixture
def model(model_folder, monkeypatch):
    """The folder, loaded once for all commands of this process, so that they compile once."""
    monkeypatch.setattr(serve_lm, "load", lambda path, **options: load_once(str(path)))
    return model_folder


load_once = functools.cache(serve_lm.load)


@pytest.fixture
def generate(call, model):
    """`generate("--prompt", "a")` with 8 greedy tokens."""
    return lambda *argv: call("generate", "--model", model, "--max-new-tokens", 8, *GREEDY, *argv)


def records(text: str) -> list[dict]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def lines(folder, *items) -> str:
    path = folder / "in.jsonl"
    path.write_bytes(b"\n".join(i if isinstance(i, bytes) else json.dumps(i).encode() for i in items) + b"\n")
    return str(path)


def test_prompts_and_json(generate, model):
    lm = serve_lm.load(model)
    expected = lm.generate(["import os", "def f("], max_new_tokens=8, temperature=0)
    plain = generate("--prompt", "import os", "--prompt", "def f(")
    assert (plain.returncode, plain.stdout) == (0, f"{expected[0].text}\n{expected[1].text}\n")
    found = generate("--prompt", "import os", "--prompt", "def f(", "--json")
    assert found.returncode == 0
    for record, prompt, g in zip(records(found.stdout), ["import os", "def f("], expected, strict=True):
        assert list(record) == FIELDS
        assert record == {"prompt": prompt, "text": g.text, "token_ids": g.token_ids,
                          "finish_reason": g.finish_reason, "prompt_tokens": g.prompt_tokens}
    assert "Traceback" not in found.stderr


def test_every_flag_reaches_the_library(call, model):
    asked = dict(max_new_tokens=12, temperature=1.3, top_p=0.8, top_k=40, repetition_penalty=1.2, seed=7, n=2)
    flags = [word for name, value in asked.items() for word in ("--" + name.replace("_", "-"), value)]
    lm = serve_lm.load(model)
    whole = lm.generate("import", **asked)
    stop = whole[0].text[2:4]
    found = call("generate", "--model", model, "--prompt", "import", "--json", "--stop=never", f"--stop={stop}", *flags)
    assert found.returncode == 0, found.stderr
    expected = lm.generate("import", stop=["never", stop], **asked)
    assert [r["token_ids"] for r in records(found.stdout)] == [g.token_ids for g in expected]
    assert expected[0].finish_reason == "stop" and [r["prompt"] for r in records(found.stdout)] == ["import"] * 2
    arguments = set(asked) | {"stop", "truncate"}
    assert set(model_flags.SAMPLING) == arguments, "a flag for every argument"


def test_two_dashes_are_a_text_like_any_other(generate):
    assert records(generate("--prompt=--", "--stop=--", "--json").stdout)[0]["prompt"] == "--"


def test_chat(generate, model):
    lm = serve_lm.load(model)
    conversation = [{"role": "user", "content": "hello"}]
    expected = lm.chat(conversation, max_new_tokens=8, temperature=0)
    [record] = records(generate("--prompt", "hello", "--chat", "--json").stdout)
    assert record["text"] == expected.text and record["prompt_tokens"] == expected.prompt_tokens
    assert generate("--prompt", "", "--chat").returncode == 2


def test_a_file_in_and_a_file_out(generate, tmp_path, model):
    lm = serve_lm.load(model)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo"}]
    items = [{"id": 7, "prompt": "import"}, {"messages": talk, "id": {"any": ["thing", None]}},
             {"prompt": "naïve 🤗", "other": 1}]
    done = generate("--input", lines(tmp_path, *items), "--output", tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    found = records((tmp_path / "out.jsonl").read_text())
    assert found == records(generate("--input", tmp_path / "in.jsonl").stdout)
    assert [r.get("id") for r in found] == [7, {"any": ["thing", None]}, None]
    assert found[1]["messages"] == talk and "prompt" not in found[1] and "id" not in found[2]
    assert found[2]["prompt"] == "naïve 🤗"
    expected = lm.generate(["import", lm.chat_ids(talk), "naïve 🤗"], max_new_tokens=8, temperature=0)
    assert [r["token_ids"] for r in found] == [g.token_ids for g in expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


BAD = [
    ({"prompt": ""}, "is empty"), (b"{", "line 3 is not JSON: Expecting property name enclosed in double"),
    (b"[1]", "line 4 is not a JSON object"),
    ({"id": 1}, "needs either `prompt` or `messages`"), ({"prompt": "a", "messages": []}, "needs either"),
    ({"prompt": 5}, "`prompt` must be text, found int"), ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "user"}]}, "message 0: content must be a text"),
    ({"prompt": "a b " * 600}, "the model's context is 1024"), (b'{"prompt": "\xff"}', "line 11 is not JSON"),
    (b'{"prompt": "a", "id": NaN}', "NaN is not a finite number"), (b'{"prompt": "a", "id": 1e999}', "not a finite"),
    (b'{"prompt": "\\ud800", "id": "\\udfff"}', "lone surrogate"), (b"[" * 100_000, "line 15 is not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "line 16 is not JSON"),
    (b'{"prompt": "a", "id": ' + b"[" * 900 + b"]" * 900 + b"}", "line 17 is nested more than 100 levels deep"),
]


def test_bad_lines_give_error_objects_and_the_others_are_done(generate, tmp_path):
    good = {"prompt": "import", "id": "good"}
    done = generate("--input", lines(tmp_path, good, *(item for item, _ in BAD), b"", b"  ", good))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    found = records(done.stdout)
    assert len(found) == len(BAD) + 2
    assert found[0] == found[-1] and found[0]["id"] == "good" and found[0]["text"]
    for record, (item, message) in zip(found[1:-1], BAD, strict=True):
        assert message in record["error"], item
        assert "text" not in record
    assert found[4]["id"] == 1 and found[13]["id"] == "\udfff"


def test_nothing_but_bad_lines(generate, tmp_path):
    done = generate("--input", lines(tmp_path, {"prompt": ""}), "--output", tmp_path / "out")
    assert done.returncode == 2 and list(records((tmp_path / "out").read_text())[0]) == ["prompt", "error"]


def test_stdin_with_a_byte_order_mark(generate, tmp_path, monkeypatch):
    path = tmp_path / "in"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "import"}\r\n')
    with open(path) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = generate("--input", "-")
    assert done.returncode == 0 and records(done.stdout)[0]["prompt"] == "import"


def test_no_new_tokens(call, model):
    done = call("generate", "--model", model, "--prompt", "import", "--max-new-tokens", 0, "--json")
    assert done.returncode == 0
    assert records(done.stdout) == [{"prompt": "import", "text": "", "token_ids": [], "finish_reason": "length",
                                     "prompt_tokens": 3}]
    assert call("generate", "--model", model, "--prompt", "import", "--max-new-tokens", 0).stdout == "\n"


@pytest.mark.parametrize("argv, message", [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "a", "--prompt", ""], "the prompt is empty"),
    (["--prompt", "a b " * 600], "prompt tokens and 8 new ones"),
    ([], "give either --prompt or --input"),
    (["--prompt", "a", "--input", "b"], "give either --prompt or --input"),
    (["--input", "/nowhere/in.jsonl"], "cannot read /nowhere/in.jsonl: No such file or directory"),
    (["--input", "/dev/null"], "/dev/null holds no input"),
    (["--prompt", "a", "--truncate", "right"], "--truncate 'right' does not exist"),
    (["--prompt", "a", "--max-new-tokens", "1.5"], "--max-new-tokens"),
])
def test_users_errors_are_one_line_and_2(generate, argv, message):
    done = generate(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("qwen2-jax: error: ") and message in done.stderr


@pytest.mark.parametrize("flag, value, message", [
    ("--temperature", "nan", "temperature must be a number of at least 0 (0 is greedy), found nan"),
    ("--temperature", "-1", "temperature must be"), ("--top-p", "2", "top_p"), ("--top-k", "-3", "top_k"),
    ("--repetition-penalty", "0", "repetition_penalty"), ("--n", "0", "n must be"), ("--seed", "-1", "seed"),
    ("--max-new-tokens", "-1", "max_new_tokens"), ("--stop", "", "stop strings"),
    ("--output", "/nowhere/out", "cannot write /nowhere/out"), ("--output", "/tmp", "it is a folder"),
])
def test_mistakes_are_told_before_the_model_is_loaded(call, monkeypatch, flag, value, message):
    monkeypatch.setattr(serve_lm, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = call("generate", "--model", "somewhere", "--prompt", "a", f"{flag}={value}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_a_missing_model_leaves_no_output(call, tmp_path):
    done = call("generate", "--model", tmp_path / "gone", "--prompt", "a", "--output", tmp_path / "out")
    assert done.returncode == 2 and "gone" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_truncate_left(generate):
    done = generate("--prompt", "a b " * 600, "--truncate", "left", "--json")
    assert done.returncode == 0 and records(done.stdout)[0]["prompt_tokens"] == 1024 - 8


def test_results_come_in_order_and_as_soon_as_they_can(generate, tmp_path, monkeypatch, model):
    """Finished out of order; after a failure, what is finished behind a gap is kept as well."""
    lm = serve_lm.load(model)
    run = type(lm).generate

    def backwards(self, prompts, *, on_done, **settings):
        found = run(self, prompts, **settings)
        for i in reversed(range(1, len(found))):
            on_done(i, found[i])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(lm), "generate", backwards)
    done = generate("--input", lines(tmp_path, *({"prompt": "import", "id": i} for i in range(4))),
                    "--output", tmp_path / "out")
    assert done.returncode == 130 and "3 finished records kept in" in done.stderr
    assert [r["id"] for r in records((tmp_path / "out").read_text())] == [1, 2, 3]


@pytest.mark.slow
def test_in_a_process_of_its_own_and_again(process_env, model_folder, tmp_path):
    """Stdout holds results and nothing else; a second start compiles nothing."""
    code = ("import sys, collections; from qwen2_jax.cli.main import entry; import jax; "
            "counts = collections.Counter(); "
            "jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition('/')[2]])); "
            "status = entry(); print(counts['cache_misses'], counts['cache_hits'], file=sys.stderr); sys.exit(status)")
    argv = ["generate", "--model", str(model_folder), "--prompt", "import", "--prompt", "a" * 200, "--json",
            "--temperature", "1", "--seed", "1", "--max-new-tokens", "20", "--stop", "zz"]
    first, second = (subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True,
                                    env=process_env | {"QWEN2_JAX_CACHE": str(tmp_path)}) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout == second.stdout and [list(r) for r in records(first.stdout)] == [FIELDS] * 2
    (missed, _), (missed_again, hit_again) = (map(int, run.stderr.split()[-2:]) for run in (first, second))
    assert missed > 5 and missed_again == 0 and hit_again == missed
    assert "compiled decode" in first.stderr and "compiled" not in second.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_finished_records(process_env, model_folder, tmp_path):
    """One short request is done at once; the others would take minutes."""
    items = [{"prompt": "import", "id": i} for i in range(2000)]
    argv = ["generate", "--model", model_folder, "--input", lines(tmp_path, *items), "--temperature", "1",
            "--max-new-tokens", "900", "--output", tmp_path / "out.jsonl"]
    with subprocess.Popen([sys.executable, "-m", "qwen2_jax", *map(str, argv)], env=process_env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(tmp_path, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err
    found = records((tmp_path / "out.jsonl").read_text())
    assert 0 < len(found) < 2000 and f"{len(found)} finished record" in err
    assert all({"id", "text"} <= set(r) for r in found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def wait_for_lines(folder, process):
    """Until the temporary output holds a line."""
    for _ in range(1200):
        assert process.poll() is None, process.stderr.read()
        if any(path.stat().st_size for path in folder.glob(".out.jsonl.*.tmp")):
            return
        time.sleep(0.1)
    pytest.fail("nothing was finished in two minutes")


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(process_env, model_folder, tmp_path):
    path = lines(tmp_path, *({"prompt": "import", "id": i} for i in range(600)))
    argv = ["generate", "--model", model_folder, "--input", path, "--max-new-tokens", "200", "--temperature", "1"]
    with subprocess.Popen([sys.executable, "-m", "qwen2_jax", *map(str, argv)], env=process_env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["id"] == 0
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 141
    assert "error" not in err and "Traceback" not in err and "Exception" not in err
