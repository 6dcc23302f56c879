"""`qwen2-jax chat`, fed through a pipe: answers on stdout as they come, everything else on stderr."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import pytest

from qwen2_jax.serve import lm as serve_lm

SYSTEM = [{"role": "system", "content": "Be brief."}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(call, model_folder, monkeypatch):
    """`chat("hello\n/exit\n")` with 6 greedy tokens an answer."""

    def run(text: str, *argv, stdin=io.StringIO, **options):
        monkeypatch.setattr(sys, "stdin", stdin(text))
        return call("chat", "--model", model_folder, "--temperature", 0, "--max-new-tokens", 6, *argv, **options)

    return run


@pytest.fixture(scope="module")
def lm(model_folder):
    return serve_lm.load(model_folder)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answers(lm, *texts: str, opening=()) -> list[str]:
    """What the library says, turn after turn."""
    messages, found = list(opening), []
    for text in texts:
        messages.append(user(text))
        found.append(lm.chat(messages, temperature=0, max_new_tokens=6).text)
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_turns_remember_each_other_until_reset(chat, lm):
    first, second = answers(lm, "héllo", "again")
    assert second != answers(lm, "again")[0]
    done = chat("héllo\n\nagain\n/reset\nagain\n/exit\nnever read\n")
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n{answers(lm, 'again')[0]}\n")
    assert "Traceback" not in done.stderr and "> " not in done.stderr


def test_a_system_message_survives_a_reset(chat, lm):
    [expected] = answers(lm, "a", opening=SYSTEM)
    assert expected != answers(lm, "a")[0]
    assert chat("a\n/reset\na\n", "--system", "Be brief.").stdout == f"{expected}\n" * 2


def test_a_person_gets_a_prompt_on_stderr(chat, lm):
    done = chat("a", stdin=Terminal)
    assert done.stdout == f"{answers(lm, 'a')[0]}\n" and done.stderr.count("> ") == 2 and "/reset" in done.stderr


def test_a_conversation_that_is_too_long_is_a_line_and_goes_on(chat, lm):
    done = chat("a b " * 600 + "\na\n")
    assert (done.returncode, done.stdout) == (0, f"{answers(lm, 'a')[0]}\n")
    assert "the conversation has" in done.stderr and "the model's context is 1024" in done.stderr
    assert "/reset" in done.stderr and "Traceback" not in done.stderr


def test_answers_stream(chat, lm, monkeypatch):
    """Each piece is written and flushed by itself."""
    written = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or write(text))
    chat("a\n", "--max-new-tokens", 30)
    assert len([text for text in written if text != "\n"]) > 2


@pytest.mark.parametrize("argv, message", [
    (["--temperature", "nan"], "temperature must be"), (["--mesh", "model=2"], "mesh axis 'model'"),
    (["--max-new-tokens", "2000"], "2000 new ones"),
])
def test_users_errors(chat, argv, message):
    done = chat("a\n", *argv)
    assert message in done.stderr and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.returncode == (0 if "2000" in argv else 2)


def test_ctrl_c_ends_an_answer_that_has_begun(chat, lm, monkeypatch):
    """What was said stays in the conversation."""
    answer = type(lm).chat

    def interrupted(self, messages, *, on_text, **settings):
        if len(messages) == 1:
            on_text("said so far")
            raise KeyboardInterrupt
        assert messages[1] == {"role": "assistant", "content": "said so far"}
        return answer(self, messages, on_text=on_text, **settings)

    monkeypatch.setattr(type(lm), "chat", interrupted)
    done = chat("a\nb\n")
    assert done.returncode == 0 and done.stdout.startswith("said so far\n") and done.stdout.count("\n") >= 2


def test_ctrl_c_between_answers_ends_the_program(chat, lm, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(lm), "chat", interrupted)
    assert chat("a\n").returncode == 130


@pytest.mark.slow
def test_in_a_process_of_its_own(process_env, model_folder, lm):
    argv = [sys.executable, "-m", "qwen2_jax", "chat", "--model", str(model_folder), "--temperature", "0",
            "--max-new-tokens", "6"]
    with subprocess.Popen(argv, env=process_env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdin.write("héllo\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
