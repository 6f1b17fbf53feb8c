import contextlib
import io
import re
import time

from facevae_jax.core import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(steps: int, file: io.StringIO) -> str:
    with contextlib.redirect_stderr(file), progress.progress_bar(total=100, description="decoding") as bar:
        for _ in range(steps):
            time.sleep(0.02)
            bar.update()
            bar.set_postfix_str("7 MB, 2 bad", refresh=False)
    return file.getvalue()


def test_a_log_file_gets_whole_lines_at_intervals(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    text = run(40, io.StringIO())
    assert "\r" not in text
    lines = text.splitlines()
    assert 1 <= len(lines) <= 6
    for line in lines:
        assert re.match(r"decoding: +\d+%.* \d+/100 \[.*<.*image/s, 7 MB, 2 bad\]", line)


def test_a_short_pass_writes_nothing():
    assert run(5, io.StringIO()) == ""


def test_a_terminal_gets_a_bar():
    text = run(3, Terminal())
    assert "\r" in text
    assert "3/100" in text
