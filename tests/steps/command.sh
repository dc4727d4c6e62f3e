#!/usr/bin/env bash
# The command with a language model: answers, messages, exit codes, a chat on a terminal
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$1"/fuzz/seeds "$work/model" || exit 1
python3 - "$PWD/$1/cli/attn" "$work" <<'PY'
import json, os, pty, select, subprocess, sys, time

attn, passed, failed = sys.argv[1], 0, 0
os.chdir(sys.argv[2])  # `model` there is a tiny one, whose vocabulary is the letters a to p
for name, data in (("zero", b"abc\0def"), ("latin1", b"abc\xe9def"), ("cut", open("model", "rb").read(900)), ("empty", b"")):
    open(name, "wb").write(data)


def check(name, ok, seen):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"{name}: {seen!r}")


def run(*arguments, given=b""):
    return subprocess.run([attn, "run", *arguments], input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


for name, code, text, arguments in (
    ("an answer", 0, "", ["model", "-p", "abc", "-n", "3"]),
    ("no such model", 1, "'nothing': No such file", ["nothing", "-p", "a"]),
    ("a text as a model", 1, "'latin1' is not a GGUF file", ["latin1", "-p", "a"]),
    ("a model that was cut off", 1, "'cut': gguf: ", ["cut", "-p", "a"]),
    ("an unknown option", 2, "attn run --help", ["model", "--nothing"]),
    ("an empty prompt", 1, "the prompt is empty", ["model", "-f", "empty"]),
    ("a zero byte", 1, "byte 4 is 0", ["model", "-f", "zero"]),
    ("a text that is not UTF-8", 0, "not in UTF-8 from byte 4", ["model", "-f", "latin1", "-n", "2"]),
    ("a prompt that is too long", 1, "has 6 tokens, but the context has room for 4", ["model", "-p", "abcdef", "--ctx", "4"]),
    ("a context that gets full", 0, "the context is full", ["model", "-p", "abc", "--ctx", "8", "-n", "100"]),
    ("its statistics", 0, "time to first token", ["model", "-p", "abc", "--ctx", "8", "-n", "100", "--stats"]),
    ("an unknown mechanism", 1, "no mechanism 'nothing'", ["model", "-p", "a", "--attention", "nothing"]),
    ("an unknown cache", 1, "expected f32, f16, bf16 or i8", ["model", "-p", "a", "--cache", "i64"]),
):
    got = run(*arguments)
    check(name, got.returncode == code and text in got.stdout.decode(errors="replace"), got)

# Chats from a pipe: an object for each answer; the second turn does not read the first one again.
got = run("model", "-n", "3", "--ignore-end", "--json", given=b"abcdefgh\na")
answers = [json.loads(line) for line in got.stdout.splitlines()]
check("a chat from a pipe", [a["generated_tokens"] for a in answers] == [3, 3], got)
check("only what is new is read", answers[1]["prompt_tokens"] < answers[0]["prompt_tokens"] + 5, got)


def chat(arguments, actions):
    """What a terminal shows of a chat, and the exit code. Each action waits for a text and types another one."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(attn, [attn, "run", "model", "--ctx", "1000000", *arguments])
    shown, seen, end = b"", 0, time.time() + 200
    while time.time() < end:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                shown += os.read(fd, 4096)
            except OSError:
                break
        if actions and actions[0][0] in shown[seen:]:
            seen = len(shown)
            os.write(fd, actions.pop(0)[1])
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CLEARED = "\r" + " " * 30 + "\r"
shown, code = chat(["-n", "6", "--ignore-end"], [(b"> ", b"abc\n"), (b"> ", b"a\n"), (b"> ", b"\n")])
answers = [part.partition("\r\n")[0] for part in shown.split(CLEARED)[1:]]
check("a chat on a terminal", code == 0 and [len(a) for a in answers] == [6, 6], (code, shown))
shown, code = chat(["-n", "1000000", "--ignore-end"], [(b"> ", b"abc\n"), (CLEARED.encode(), b"\x03"), (b"> ", b"\x03")])
check("Ctrl-C stops the answer, and at the prompt the chat", code == 130 and shown.count("> ") == 2, (code, shown[-200:]))
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
PY
