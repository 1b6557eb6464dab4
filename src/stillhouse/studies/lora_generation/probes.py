"""The probe texts behind delta activations, by name. Imports no torch: configuration and reports name them.

A probe is a short instruction without content of its own: what an adapter does to the model shows in the state in
which it is left (Delta Activations, arXiv 2509.04442). Every delta that is compared with another comes from the same
`ProbeSettings`; a cache records them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel

Domain = Literal["science", "commonsense", "reading", "mathematics"]

GENERIC = (
    "Here is a task. Write a reply that does what it asks.",
    "Read the request below and give a complete and helpful answer.",
    "Think about what is wanted here, then answer it as well as you can.",
    "Please deal with the following input in the right way.",
    "You get an instruction. Follow it and give the result.",
)
BY_DOMAIN: dict[Domain, tuple[str, ...]] = {
    "science": (
        "Question: Why does ice float on water?\nAnswer:",
        "Question: Which part of a plant takes in light?\nAnswer:",
        "Question: What makes the tides rise and fall?\nAnswer:",
        "Question: Which material carries electricity best?\nAnswer:",
        "Question: How does a bat find its way in the dark?\nAnswer:",
    ),
    "commonsense": (
        "She filled the kettle, put it on the stove and",
        "The box did not fit on the shelf because it was too",
        "To dry wet shoes without damage, you should",
        "He dropped the glass on the stone floor. It",
        "Before she painted the wall, Maria first",
    ),
    "reading": (
        "The bridge was opened in 1931 and closed to cars in 1987.\nQuestion: may cars use the bridge today?\nAnswer:",
        "Most owls hunt at night; the hawk owl hunts by day.\nQuestion: do all owls hunt at night?\nAnswer:",
        "The club plays its home games in the north of the city.\nQuestion: does the club play in the city?\nAnswer:",
        "Salt lowers the temperature at which water freezes.\nQuestion: does salt water freeze later?\nAnswer:",
        "The novel was sold in ten countries within a year.\nQuestion: was the novel sold abroad?\nAnswer:",
    ),
    "mathematics": (
        "Question: A crate holds 12 bottles. How many bottles are in 7 crates?\nAnswer:",
        "Question: Ann had 30 coins and gave away a third. How many are left?\nAnswer:",
        "Question: A train goes 60 km in an hour. How far does it go in 4 hours?\nAnswer:",
        "Question: Three pens cost 6 euros. What do five pens cost?\nAnswer:",
        "Question: A class of 28 is split into groups of 4. How many groups are there?\nAnswer:",
    ),
}
# Three of each kind: fifteen.
MIXED = tuple(text for texts in (GENERIC, *BY_DOMAIN.values()) for text in texts[:3])


class ProbeSettings(StrictModel):
    """Which texts are read, and how; delta activations agree on all of it or are not comparable."""

    kind: Annotated[
        Literal["generic", "domain", "mixed"], Field(description="Five texts, five of one domain, or fifteen of all.")
    ] = "mixed"
    domain: Annotated[Domain | None, Field(description="Of kind domain.")] = None
    formatting: Annotated[
        Literal["plain", "chat"], Field(description="The text as it is, or as a user's turn of the chat template.")
    ] = "plain"
    max_length: Annotated[int, Field(ge=1, description="Longest probe in tokens; nothing is cut.")] = 128
    at_once: Annotated[
        int, Field(ge=1, description="Adapters in one forward pass; changes speed and memory, not results.")
    ] = 8
    engine: Annotated[
        Literal["hooks", "functional_call"],
        Field(description="How an adapter reaches the model: hooks, or changed weights one adapter at a time; equal."),
    ] = "hooks"

    @model_validator(mode="after")
    def domain_goes_with_its_kind(self) -> ProbeSettings:
        """Refuse a domain that is not read, and a kind that lacks one."""
        if (self.kind == "domain") != (self.domain is not None):
            raise SettingError(("domain",), "is for kind domain, which needs it, and for no other")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The probe texts, in order."""
        if self.domain is not None:
            return BY_DOMAIN[self.domain]
        return GENERIC if self.kind == "generic" else MIXED
