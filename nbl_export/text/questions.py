"""Questions about a short text, each a user's turn of a chat: what both decoders answer stands in the report.

The text is longer than the recent tokens of a usual exit layer, so that an answer needs predicted KV.
"""

from __future__ import annotations

__all__ = ["PASSAGE", "QUESTIONS", "turns"]

PASSAGE = (
    "The harbour library of Arlow will move in spring. For forty years it stood beside the fish market, in a brick "
    "house that Mira Halloran, a retired ship's engineer, gave to the town in 1984. The house has become too small: "
    "31,000 books fill four rooms, and last winter the roof leaked twice. The new rooms lie on the second floor of "
    "the old rope factory, ten minutes to the north by foot. They have a lift, a reading room with a view of the "
    "river, and space for children, who had none before. The move begins on Monday, 3 March, and takes three weeks. "
    "Until then each reader may borrow up to twenty books instead of six, for there is less to carry if many books "
    "are at home. Books that are returned during the move go to the town hall, where a table stands beside the "
    "entrance. Forty volunteers have said that they will help, among them the whole rowing club. The director, "
    "Tomas Berg, asks for strong boxes, for tea, and for patience. What becomes of the brick house is not decided. "
    "The council would like to sell it. Many readers hope for a small museum of the harbour, with the engineer's "
    "drawings on its walls. A meeting about this takes place in the market hall on 12 April at seven in the "
    "evening, and everyone may speak."
)
QUESTIONS = (
    "Who gave the brick house to the town, and in which year?",
    "Summarize the text in two sentences.",
    "Write a short note that asks a neighbour to help with the move.",
)


def turns() -> tuple[str, ...]:
    """The text with each question."""
    return tuple(f"{PASSAGE}\n\n{question}" for question in QUESTIONS)
