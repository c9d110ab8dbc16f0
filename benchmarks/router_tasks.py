"""Tasks of the router gym: inputs whose labels need facts that stand far away, so that somebody has to carry them.

A fact is one token, DEF(j, v): it says that name j has value v. A use is one token, USE(j); its label is v. The other
tokens are noise. Local attention cannot bring a fact to a use far away, so a use is answered when the heavy branch of
some layer reads the use as a query and its fact as a key. In the task "cross" uses are the decoder's tokens, and the
facts are the encoder's: a use is answered when the routers of cross-attention choose its fact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VALUES = 8
NOISE_TYPES = 256
MARK = 2
FIRST_TYPE = 3
# a marked section: its mark stands at its beginning, what it says holds for the tokens up to 100 places behind it
SECTION = 128
MARKED_REACH = 100
# how many facts, or uses, a section of the marked task holds at most
SECTION_FACTS = 32
# links of the two-hop task lead to one of so many names
LINKS = 8
TASKS = ("facts", "marked", "two_hops", "cluster", "cross")


@dataclass
class Examples:
    """A batch of a task.

    Attributes:
        ids: int64 [batch, n], the tokens.
        labels: int64 [batch, n], the value at every place that is trained, -100 elsewhere; with a decoder [batch, m],
            the token of each value.
        asked: bool, as many as labels, the places whose accuracy counts.
        needed_queries: bool [batch, n], tokens that have to be queries of some heavy branch.
        needed_keys: bool [batch, n], tokens that have to be its keys.
        needed_memory: bool [batch, n], tokens that cross-attention has to read.
        decoder_ids: int64 [batch, m], the decoder's tokens; None without a decoder.
    """

    ids: Tensor
    labels: Tensor
    asked: Tensor
    needed_queries: Tensor
    needed_keys: Tensor
    needed_memory: Tensor
    decoder_ids: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """A model's keywords."""
        inputs = {"input_ids": self.ids, "labels": self.labels}
        return inputs if self.decoder_ids is None else inputs | {"decoder_input_ids": self.decoder_ids}


@dataclass(frozen=True)
class Task:
    """A task at a size; its token types do not depend on the length of the inputs that are drawn.

    Attributes:
        name: "facts": facts and uses anywhere. "cluster": all facts within one place of the input. "two_hops": a use
            names a link elsewhere, and the link names the fact; links have labels too, uses alone are counted.
            "marked": inputs are full of facts and uses of the same types that do not count. A mark, up to 100 tokens
            before, says which do; every name that is asked for has a fact that counts and one that does not. "cross":
            facts anywhere in the encoder's input, uses in the decoder's.
        facts: how many facts an input has, and how many uses.
    """

    name: str
    facts: int

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"task is {self.name!r}; it must be one of {', '.join(TASKS)}")
        if self.facts < 1 or self.facts > SECTION_FACTS and self.facts % SECTION_FACTS:
            raise ValueError(
                f"facts is {self.facts}; it must be at least 1, and above {SECTION_FACTS} a multiple of it"
            )

    @property
    def names(self) -> int:
        """How many names there are; of a marked task half of them are asked for in an input."""
        return 2 * self.facts if self.name == "marked" else self.facts

    @property
    def vocab_size(self) -> int:
        """Marks, facts, uses, links, the tokens of values, noise."""
        return self._first_noise + NOISE_TYPES

    @property
    def _first_use(self) -> int:
        return FIRST_TYPE + self.names * VALUES

    @property
    def _first_link(self) -> int:
        return self._first_use + self.names

    @property
    def _first_value(self) -> int:
        return self._first_link + (self.names * LINKS if self.name == "two_hops" else 0)

    @property
    def _first_noise(self) -> int:
        return self._first_value + (VALUES if self.name == "cross" else 0)

    @property
    def shortest(self) -> int:
        """The shortest input that the task can be drawn for."""
        return 4 * SECTION * -(-self.facts // SECTION_FACTS) if self.name == "marked" else 4 * self.facts

    def draw(self, batch: int, n: int, generator: torch.Generator) -> Examples:
        """A batch of inputs of n tokens, on the generator's device.

        Raises:
            ValueError: for inputs too short to hold the task.
        """
        if n < self.shortest:
            raise ValueError(f"n is {n}; a task {self.name!r} of {self.facts} facts needs at least {self.shortest}")
        device = generator.device
        ids = torch.randint(self._first_noise, self.vocab_size, (batch, n), generator=generator, device=device)
        values = torch.randint(0, VALUES, (batch, self.facts), generator=generator, device=device)
        names = torch.arange(self.facts, device=device).expand(batch, -1)
        if self.name == "cross":
            return self._across(ids, names, values, generator)
        links = None
        if self.name == "marked":
            facts, uses, values = self._draw_marked(ids, values, generator)
        else:
            if self.name == "cluster":
                facts, uses = self._places_in_a_cluster(batch, n, generator)
            else:
                parts = 3 if self.name == "two_hops" else 2
                places = _draw_places(batch, n, parts * self.facts, generator)
                facts, uses, *rest = places.split(self.facts, 1)
                links = rest[0] if rest else None
            ids.scatter_(1, facts, self._fact(names, values))
            ids.scatter_(1, uses, self._first_use + names)
            if links is not None:
                step = torch.randint(0, LINKS, (batch, self.facts), generator=generator, device=device)
                ids.scatter_(1, links, self._first_link + names * LINKS + step)
                values = values.gather(1, (names + step) % self.facts)
        labels = torch.full_like(ids, -100).scatter_(1, uses, values)
        asked = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, uses, True)
        queries, keys = asked.clone(), torch.zeros_like(asked).scatter_(1, facts, True)
        if links is not None:
            labels.scatter_(1, links, values)
            queries.scatter_(1, links, True)
            keys.scatter_(1, links, True)
        return Examples(ids, labels, asked, queries, keys, torch.zeros_like(asked))

    def _across(self, ids: Tensor, names: Tensor, values: Tensor, generator: torch.Generator) -> Examples:
        """The facts go into `ids`, in place; the uses, in random order, are the decoder's tokens."""
        places = _draw_places(*ids.shape, self.facts, generator)
        ids.scatter_(1, places, self._fact(names, values))
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        order = _draw_places(len(ids), self.facts, self.facts, generator)
        labels = self._first_value + values.gather(1, order)
        memory = nothing.scatter(1, places, True)
        asked = torch.ones_like(labels, dtype=torch.bool)
        return Examples(ids, labels, asked, nothing, nothing, memory, self._first_use + order)

    def _fact(self, names: Tensor, values: Tensor) -> Tensor:
        return FIRST_TYPE + names * VALUES + values

    def _places_in_a_cluster(self, batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Facts within a part twice as long as they are many, uses anywhere outside of it."""
        part = 2 * self.facts
        first = torch.randint(0, n - part, (batch, 1), generator=generator, device=generator.device)
        uses = _draw_places(batch, n - part, self.facts, generator)
        return first + _draw_places(batch, part, self.facts, generator), uses + part * (uses >= first)

    def _draw_marked(self, ids: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Fill `ids` in place: sections of facts or of uses, of which a mark says which count.

        Returns:
            The places of the facts and of the uses that count, and the values that these uses ask for.
        """
        (batch, n), device = ids.shape, ids.device
        sections, each = n // SECTION, min(self.facts, SECTION_FACTS)
        marked = self.facts // each

        def shuffled(count: int) -> Tensor:
            return torch.rand(batch, count, generator=generator, device=device).argsort(1)

        asked_names, other_names = shuffled(self.names).split(self.facts, 1)
        # sections: the first of this order hold facts that count, then uses that count, then the other facts of the
        # names that are asked for; what is left holds facts of other names, or uses without a label
        order = shuffled(sections)
        of_facts = torch.randint(0, 2, (batch, sections, 1), generator=generator, device=device) == 0
        other = other_names.gather(
            1, torch.randint(0, self.facts, (batch, sections * each), generator=generator, device=device)
        ).view(batch, sections, each)
        any_value = torch.randint(0, VALUES, other.shape, generator=generator, device=device)
        any_name = torch.randint(0, self.names, other.shape, generator=generator, device=device)
        tokens = torch.where(of_facts, self._fact(other, any_value), self._first_use + any_name)
        places = (
            4 + torch.rand(batch, sections, MARKED_REACH - 4, generator=generator, device=device).topk(each, 2).indices
        )
        places = places + SECTION * torch.arange(sections, device=device)[:, None]

        def within(part: int) -> Tensor:
            return order[:, part * marked : (part + 1) * marked, None].expand(-1, -1, each)

        fact_order, use_order, decoy_order = shuffled(self.facts), shuffled(self.facts), shuffled(self.facts)
        decoy_values = torch.randint(0, VALUES, values.shape, generator=generator, device=device)
        for part, filling in enumerate(
            (
                self._fact(asked_names.gather(1, fact_order), values.gather(1, fact_order)),
                self._first_use + asked_names.gather(1, use_order),
                self._fact(asked_names.gather(1, decoy_order), decoy_values),
            )
        ):
            tokens.scatter_(1, within(part), filling.view(batch, marked, each))
        ids.scatter_(1, places.flatten(1), tokens.flatten(1))
        offsets = torch.randint(0, 4, (batch, 2 * marked), generator=generator, device=device)
        ids.scatter_(1, offsets + SECTION * order[:, : 2 * marked], MARK)
        facts, uses = (places.gather(1, within(part)).flatten(1) for part in (0, 1))
        return facts, uses, values.gather(1, use_order)


def _draw_places(batch: int, n: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different places of n, in random order: int64 [batch, count]."""
    return torch.rand(batch, n, generator=generator, device=generator.device).topk(count, 1).indices
