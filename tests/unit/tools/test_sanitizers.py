"""The tool that runs the kernels' tests under sanitizers; the runs themselves are `make sanitize`."""

from tools.sanitizers.__main__ import SANITIZERS, main


def test_an_unknown_sanitizer_is_refused_with_those_there_are(capsys):
    assert main(["memory"]) == 2
    assert "|".join(SANITIZERS) in capsys.readouterr().err
