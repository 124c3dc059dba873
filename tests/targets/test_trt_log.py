"""What TensorRT says is never lost: it explains an error, or reaches Python's log."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.messages import Messages, require

from ..fake_tensorrt import FakeDevice, FakeTensorRT

pytestmark = pytest.mark.trt

FALLBACK = "The engine is not graph capturable. Falling back to not using CUDA graphs."
NOISE = "Make sure input input_ids has Int64 binding."


@pytest.fixture
def heard() -> Messages:
    return Messages(FakeTensorRT(FakeDevice(), ()))


def say(messages: Messages, severity: str, text: str) -> bool:
    trt: Any = FakeTensorRT(FakeDevice(), ())
    trt.Runtime(messages.logger)
    return bool(trt.say(severity, text))


def test_a_message_outside_a_block_reaches_the_log(heard: Messages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for severity, text in (
        ("WARNING", FALLBACK), ("ERROR", "out of\n  memory"), ("INTERNAL_ERROR", "assertion"), ("INFO", "loaded"),
        ("WARNING", NOISE), ("VERBOSE", "a thousand lines"),
    ):  # fmt: skip
        say(heard, severity, text)
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert found == [
        ("WARNING", f"TensorRT: {FALLBACK}"), ("ERROR", "TensorRT: out of memory"), ("ERROR", "TensorRT: assertion"),
        ("DEBUG", "TensorRT: loaded"), ("DEBUG", f"TensorRT: {NOISE}"),
    ]  # fmt: skip


def test_complaints_of_a_block_that_succeeds_are_warnings(heard: Messages, caplog: pytest.LogCaptureFixture) -> None:
    with heard.explaining("no step") as said:
        say(heard, "WARNING", FALLBACK)
        say(heard, "WARNING", NOISE)
    assert [message.text for message in said] == [FALLBACK, NOISE]
    assert caplog.messages == [f"TensorRT: {FALLBACK}"]


@pytest.mark.parametrize("error", [RuntimeError("bindings"), TypeError("nullptr"), ValueError("x"), MemoryError()])
def test_an_exception_of_the_library_is_ours_and_quotes_the_library(
    heard: Messages, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:

    def fail() -> None:
        say(heard, "INFO", "allocating")
        say(heard, "ERROR", "out of memory")
        raise error

    expected = r"^TensorRT refuses a step: out of memory; use less$"
    with pytest.raises(NblError, match=expected) as caught, heard.explaining("TensorRT refuses a step", "use less"):
        fail()
    assert caught.value.__cause__ is error
    assert caplog.messages == []  # the error has said it


def test_what_has_no_message_is_told_by_the_exception(heard: Messages) -> None:
    for error, text in ((RuntimeError("Error in x."), "Error in x."), (TypeError("nullptr"), "TypeError: nullptr")):
        with pytest.raises(NblError, match=rf"^no builder: {text}$"), heard.explaining("no builder"):
            raise error


@pytest.mark.parametrize(("what", "begins"), [("", "no plan"), ("a shape", "TensorRT refuses a shape")])
@pytest.mark.parametrize("answer", [False, None])
def test_false_and_none_are_refusals(heard: Messages, answer: bool | None, what: str, begins: str) -> None:
    with pytest.raises(NblError, match=f"^{begins}: it gives no reason$"), heard.explaining("no plan"):
        require(answer, what)
    with heard.explaining("no plan"):
        assert (require(0), require("plan")) == (0, "plan")


def test_our_own_errors_and_interrupts_pass(heard: Messages) -> None:
    with pytest.raises(NblError, match=r"^ours$"), heard.explaining("no plan"):
        raise NblError("ours")
    with pytest.raises(KeyboardInterrupt), heard.explaining("no plan"):
        raise KeyboardInterrupt


def test_an_inner_block_leaves_the_outer_ones_messages(heard: Messages) -> None:
    with heard.explaining("no plan") as outer:
        with heard.explaining("no step"):
            pass
        say(heard, "ERROR", "later")
    assert [message.text for message in outer] == ["later"]
