"""A third text, of any length: seeded documents for the trained test model, made by rules and shipped as rules.

Consumes the name of a split and a size, produces text. Nothing is downloaded and nothing is taken from elsewhere, so
the text is the same on every machine and free of other people's rights. It is no noise: people carry things between
places and are asked for them later, tills are added up, ferries keep to their timetable, programs are executed,
invented words are explained and then used, weekdays are counted on. Most of what comes next follows from what stood
dozens or hundreds of tokens before: a model that lost precision gets it wrong, where text of random words would not
show it. Words are used as unevenly as in natural text. Some documents hold names in other scripts, which the
tokenizer spells in bytes, so that byte tokens are trained, too.

Of `random` only `Random(str).random()` is used, whose sequence Python promises to keep.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS = _words(
    "lantern kettle ladder basket rope hammer violin blanket compass mirror candle saddle bucket teapot parcel "
    "umbrella bell drum anchor spade quilt barrel jug broom flute clock crate whistle loom chisel ledger map sieve "
    "trunk wheel stool scarf net oar cradle"
)
PLACES = _words(
    "mill harbour orchard cellar tower stable bakery chapel garden attic library bridge market forge meadow quarry "
    "lighthouse vineyard courtyard boathouse brewery granary schoolhouse workshop well tannery"
)
ADJECTIVES = _words(
    "old small heavy green broken blue copper long wooden empty new yellow narrow painted rusty white silver wet black "
    "round striped dusty borrowed tall crooked polished grey leather faded mended"
)
GOODS = _words(
    "apples eggs candles nails onions ribbons herrings pears bricks buttons plums needles loaves carrots walnuts "
    "feathers turnips spoons lemons corks"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COUNTS = ("no", "one", "two", "three", "four", "five", "six")
CRAFTS = _words("miller baker weaver potter cooper tailor fisher mason joiner saddler tinker glazier brewer dyer")
VARIABLES = _words("ash birch cedar elm fir gorse hazel ivy larch maple oak pine reed sedge thorn willow yew")
PROCEDURES = _words("sift gather mend carry weigh sort count fold stack rinse")
NOUNS = _words(
    "river hill rain field road stone wind winter cloud forest shore summer fog village marsh moon valley frost storm "
    "island hedge snow path dune harvest evening morning cliff pasture thaw"
)
MOTIONS = _words(
    "rose fell turned faded settled spread waited darkened passed returned lingered brightened widened froze drifted "
    "vanished"
)
MANNERS = ("slowly", "early", "late", "softly", "again", "at once", "in silence", "before noon", "after dusk")
BEGINNINGS = _words("B D F G H J K L M N P R S T V W Br Dr Fl Gr Kr Sk St Th Tr")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
ENDINGS = ("n", "r", "l", "s", "k", "th", "nd", "m", "lt", "")
# Letters of a script, and how many of them make a name.
SCRIPTS = (
    ("αβγδεζηθικλμνξοπρστυφχψω", 6),
    ("абвгдежзийклмнопрстуфхцчшщыэюя", 6),
    ("აბგდევზთიკლმნოპრსტუფქ", 6),
    ("אבגדהוזחטיכלמנסעפצקרשת", 5),
    ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", 5),
    ("कखगघचछजझटठडढतथदधनपफबभमयरलवशसह", 4),
    ("กขคงจฉชซณดตถทธนบปผพฟภมยรลวสห", 5),
    ("あいうえおかきくけこさしすせそたちつてとなにぬねの", 4),
    ("山川田木水火土金月日石竹米花雨雪", 2),
    ("가나다라마바사아자차카타파하고노도로모보", 3),
)


class Dice:
    """Choices that follow from a seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """0 .. n - 1, each as often."""
        return int(self._random() * n)

    def chance(self, share: float) -> bool:
        return self._random() < share

    def pick(self, among: Sequence[T]) -> T:
        return among[self.below(len(among))]

    def usual(self, among: Sequence[T]) -> T:
        """The earlier in the row, the more often: about as 1 / rank."""
        return among[int((len(among) + 1) ** self._random()) - 1]

    def several(self, draw: Callable[[], T], n: int) -> list[T]:
        """`n` different ones."""
        found: list[T] = []
        while len(found) < n:
            if (one := draw()) not in found:
                found.append(one)
        return found

    def say(self, template: str, **fields: object) -> str:
        """`[a|b]` becomes a or b, `{name}` its field; a sentence begins with a capital."""
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: self.pick(match[1].split("|")), template).format(**fields)
        return re.sub(r"^\W*\w", lambda match: match[0].upper(), text)

    def name(self) -> str:
        """An invented name, a new one in nearly every document: to write it again, it has to be copied."""
        middle = "".join(self.pick("lmnrstvdbk") + self.pick("aeiou") for _ in range(self.below(2)))
        return self.pick(BEGINNINGS) + self.pick(VOWELS) + middle + self.pick(ENDINGS)

    def foreign_name(self) -> str:
        letters, length = self.pick(SCRIPTS)
        return "".join(self.pick(letters) for _ in range(length))


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- kinds of documents ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """Where everybody and everything is; `at` of a thing is a place or a person. `things` have their adjective."""

    dice: Dice
    places: list[str]
    she: dict[str, bool]
    where: dict[str, str]
    things: dict[str, str]
    at: dict[str, str]

    def things_of(self, owner: str) -> list[str]:
        """With their adjectives."""
        return [self.things[thing] for thing, place in self.at.items() if place == owner]

    def hand_over(self, person: str, subject: str) -> str | None:
        others = [other for other, place in self.where.items() if place == self.where[person] and other != person]
        held = [thing for thing, owner in self.at.items() if owner == person]
        if not others or not held:
            return None
        thing, other = self.dice.pick(held), self.dice.pick(others)
        self.at[thing] = other
        return self.dice.say("{s} [gave|handed|passed] the {t} to {o}.", s=subject, t=self.things[thing], o=other)

    def take(self, person: str, subject: str) -> str | None:
        lying = [thing for thing, place in self.at.items() if place == self.where[person]]
        if not lying:
            return None
        thing = self.dice.pick(lying)
        self.at[thing] = person
        return self.dice.say("{s} [took|picked up|found] the {t}.", s=subject, t=self.things[thing])

    def leave(self, person: str, subject: str) -> str | None:
        held = [thing for thing, owner in self.at.items() if owner == person]
        if not held:
            return None
        thing = self.dice.pick(held)
        self.at[thing] = place = self.where[person]
        return self.dice.say("{s} [left|put down|forgot] the {t} in the {p}.", s=subject, t=thing, p=place)

    def walk(self, person: str, subject: str) -> str:
        here = self.where[person]
        self.where[person] = there = self.dice.pick([place for place in self.places if place != here])
        lying = self.things_of(there)
        seen = f", where the {listed(lying)} {'was' if len(lying) == 1 else 'were'}." if lying else "."
        way = "{s} [went|walked|hurried|ran] [from the {h} to the {p}|to the {p}]"
        return self.dice.say(way, s=subject, h=here, p=there) + seen

    def ask(self, person: str, subject: str) -> str:
        """A question that everything before answers."""
        thing = self.dice.pick(list(self.at))
        other = self.dice.pick([someone for someone in self.where if someone != person])
        place = self.at[thing]
        answer = f"In the {place}"
        if place in self.where:
            answer = {person: "You have it", other: "I have it"}.get(place, f"{place} has it")
        asked = self.dice.say('"Where is the {t}?" asked {s}.', t=self.things[thing], s=subject)
        return f'{asked} "{answer}," said {other}.'


def story(dice: Dice) -> str:
    """People carry things between places; now and then, and at the end, it is said where all of it is."""
    people = dice.several(dice.name, 2 + dice.below(2))
    places = dice.several(lambda: dice.usual(PLACES), 3 + dice.below(2))
    words = dice.several(lambda: dice.usual(THINGS), 3 + dice.below(2))
    world = _World(
        dice,
        places,
        {person: dice.chance(0.5) for person in people},
        {person: dice.pick(places) for person in people},
        {word: f"{dice.usual(ADJECTIVES)} {word}" for word in words},
        {word: dice.pick(places) for word in words},
    )
    lines = [
        dice.say("{p} [was|stood|waited] in the {place}.", p=person, place=place)
        for person, place in world.where.items()
    ]
    lines += [
        dice.say("[the {t} was|there was the {t}|the {t} lay] in the {place}.", t=world.things[thing], place=place)
        for thing, place in world.at.items()
    ]
    before = ""
    for _ in range(10 + dice.below(12)):
        person = before if before and dice.chance(0.5) else dice.pick(people)
        subject = person if person != before else "she" if world.she[person] else "he"
        acts = [world.hand_over, world.take, world.leave, world.ask, world.walk, world.walk]
        done = dice.pick(acts)(person, subject)
        lines.append(done if done is not None else world.walk(person, subject))
        before = person
    lines.append(dice.say("[at the end of the day|when night fell|in the end]:"))
    for person in people:
        held = world.things_of(person)
        has = f"with the {listed(held)}" if held else "with nothing"
        lines.append(f"{person} was in the {world.where[person]} {has}.")
    for place in places:
        if lying := world.things_of(place):
            lines.append(f"In the {place} {'was' if len(lying) == 1 else 'were'} the {listed(lying)}.")
    return " ".join(lines)


def till(dice: Dice) -> str:
    """Sales at fixed prices, each multiplied out, with the sum so far."""
    goods = dice.several(lambda: dice.usual(GOODS), 3 + dice.below(2))
    price = {good: 2 + dice.below(8) for good in goods}
    seller, *buyers = dice.several(dice.name, 4)
    lines = [dice.say("{s}, the {c}, sells {g}.", s=seller, c=dice.usual(CRAFTS), g=listed(goods))]
    lines += [f"{good.capitalize()} cost {pence} pence each." for good, pence in price.items()]
    total = 0
    for _ in range(5 + dice.below(5)):
        good, n = dice.usual(goods), 2 + dice.below(8)
        total += n * price[good]
        lines.append(
            dice.say(
                "{b} [bought|took] {n} {g} and paid {paid} pence; [the till held|in the till were] {total}.",
                b=dice.pick(buyers),
                n=n,
                g=good,
                paid=n * price[good],
                total=total,
            )
        )
    lines.append(f"In all {seller} earned {total} pence.")
    return "\n".join(lines)


def timetable(dice: Dice) -> str:
    """Departures at a fixed distance, and who takes which."""
    start, end, first, second = dice.several(dice.name, 4)
    minutes, step = 5 * (60 + dice.below(60)), 5 * (2 + dice.below(11))
    times = [f"{at // 60}:{at % 60:02}" for at in range(minutes, minutes + 9 * step, step)]
    vessel = dice.pick(("ferry", "coach", "train"))
    lines = [f"The {vessel} from {start} to {end} leaves every {step} minutes: {', '.join(times)}."]
    for person in (first, second):
        at = dice.below(len(times) - 1)
        lines.append(
            dice.say(
                "{p} [came too late for|missed] the {v} at {a} and [took|waited for] the one at {b}.",
                p=person,
                v=vessel,
                a=times[at],
                b=times[at + 1],
            )
        )
    lines.append(f"The last {vessel} from {start} to {end} leaves at {times[-1]}.")
    return " ".join(lines)


def program(dice: Dice) -> str:
    """A program in a small language, with what it prints as comments: blocks close, values are computed."""
    name = dice.pick(PROCEDURES)
    variables = dice.several(lambda: dice.usual(VARIABLES), 3)
    values = {variable: 1 + dice.below(9) for variable in variables}
    lines = [f"procedure {name}({', '.join(variables)})"]
    lines += [f"  {variable} := {value}" for variable, value in values.items()]
    for _ in range(4 + dice.below(5)):
        target, source, n = dice.pick(variables), dice.pick(variables), 1 + dice.below(5)
        match dice.below(4):
            case 0:
                values[target] = values[source] + n
                lines.append(f"  {target} := {source} + {n}")
            case 1:
                lines.append(f"  print({target})  # {values[target]}")
            case 2:
                holds = values[target] > values[source]
                lines.append(f"  if {target} > {source} then  # {'yes' if holds else 'no'}")
                lines.append(f"    {target} := {source}")
                lines.append("  end if")
                values[target] = values[source] if holds else values[target]
            case _:
                times = 2 + dice.below(3)
                lines.append(f"  repeat {times} times")
                lines.append(f"    {target} := {target} + {n}")
                lines.append("  end repeat")
                values[target] += times * n
    lines += [f"  print({variable})  # {value}" for variable, value in values.items()]
    lines.append(f"end procedure {name}")
    return "\n".join(lines)


def letter(dice: Dice) -> str:
    """A letter with days counted on, signed with the name it began with."""
    sender, receiver, friend = dice.several(dice.name, 3)
    today = dice.below(7)
    place, thing = dice.usual(PLACES), f"{dice.usual(ADJECTIVES)} {dice.usual(THINGS)}"
    lines = [f"{DAYS[today]}", f"Dear {receiver},", dice.say("[thank you for|I write about|here is] the {t}.", t=thing)]
    for _ in range(2 + dice.below(3)):
        n = 1 + dice.below(6)
        when = f"In {COUNTS[n]} day{'s' if n > 1 else ''}, on {DAYS[(today + n) % 7]},"
        if dice.chance(0.4):
            when = f"{COUNTS[n].capitalize()} day{'s' if n > 1 else ''} ago, on {DAYS[(today - n) % 7]},"
            lines.append(dice.say("{w} {f} [was in|came to] the {p}.", w=when, f=friend, p=place))
        else:
            lines.append(dice.say("{w} {f} and I [will be in|go to] the {p}.", w=when, f=friend, p=place))
    lines.append(dice.say("[please bring|do not forget|take good care of] the {t}, dear {r}.", t=thing, r=receiver))
    return "\n".join([*lines, f"Yours, {sender}"])


def family(dice: Dice) -> str:
    """Two generations of a family, and what follows from who is whose child."""
    mother, father, *children = dice.several(dice.name, 5)
    she = {mother: True, father: False} | {child: dice.chance(0.5) for child in children}
    grandchild = dice.name()
    of = {child: "daughter" if she[child] else "son" for child in children}
    parent = dice.pick(children)
    others = [child for child in children if child != parent]
    lines = [f"{mother} and {father} are married."]
    lines += [f"{child} is the {of[child]} of {mother} and {father}." for child in children]
    lines.append(f"{parent} has a child, {grandchild}.")
    lines.append(dice.say("[so|therefore] {m} is the grandmother of {g}.", m=mother, g=grandchild))
    lines.append(f"{father} is the grandfather of {grandchild}.")
    for child in others:
        lines.append(f"{child} is the {'sister' if she[child] else 'brother'} of {parent}.")
        lines.append(f"{child} is the {'aunt' if she[child] else 'uncle'} of {grandchild}.")
    crafts = {name: dice.usual(CRAFTS) for name in dice.several(lambda: dice.pick(list(she)), 3)}
    lines += [f"{name} is a {craft}." for name, craft in crafts.items()]
    lines += [
        f"{name}, the {craft}, {'gave her' if she[name] else 'gave his'} {dice.usual(THINGS)} to {grandchild}."
        for name, craft in reversed(crafts.items())
    ]
    return " ".join(lines)


def glossary(dice: Dice) -> str:
    """Invented words, explained once and used afterwards."""
    words = dice.several(lambda: dice.name().lower(), 3)
    meaning = {word: f"{dice.usual(ADJECTIVES)} {dice.usual(THINGS)}" for word in words}
    person = dice.name()
    lines = [dice.say("[a|every] {w} is a {m}.", w=word, m=what) for word, what in meaning.items()]
    for _ in range(4 + dice.below(4)):
        word = dice.pick(words)
        place = dice.usual(PLACES)
        template = "{p} [saw|bought|mended|hid] a {w}, a {m}, in the {place}."
        lines.append(dice.say(template, p=person, w=word, m=meaning[word], place=place))
    return " ".join(lines)


def register(dice: Dice) -> str:
    """Names in other scripts, called up once more in the opposite order."""
    rows = {dice.foreign_name(): (1 + dice.below(9), dice.usual(GOODS)) for _ in range(3 + dice.below(3))}
    lines = [f"{number}. {name}: {n} {good}" for number, (name, (n, good)) in enumerate(rows.items(), start=1)]
    lines.append("Called again:")
    lines += [f"{name} ({good})" for name, (_, good) in reversed(rows.items())]
    return "\n".join(lines)


def landscape(dice: Dice) -> str:
    """Free sentences; each document keeps to a few words of its own."""
    nouns = dice.several(lambda: dice.usual(NOUNS), 5)
    motions = dice.several(lambda: dice.usual(MOTIONS), 4)
    lines = []
    for _ in range(6 + dice.below(8)):
        one, two = dice.usual(nouns), dice.usual(nouns)
        fields = {"a": dice.usual(ADJECTIVES), "n": one, "m": dice.usual(motions), "o": two, "h": dice.usual(MANNERS)}
        lines.append(
            dice.say(
                "[the {n} {m} {h}|the {a} {n} {m}|over the {o} the {n} {m}|the {n} {m}, and the {o} {m} {h}|"
                "no {n} was as {a} as the {o}|when the {n} {m}, the {o} was {a}].",
                **fields,
            )
        )
    return " ".join(lines)


# Each kind with how often it comes.
KINDS: tuple[tuple[Callable[[Dice], str], int], ...] = (
    (story, 8),
    (till, 4),
    (timetable, 3),
    (program, 4),
    (letter, 3),
    (family, 3),
    (glossary, 3),
    (register, 2),
    (landscape, 3),
)


def document(split: str, number: int) -> str:
    """The document of this number in a split; every split has its own seeds."""
    dice = Dice(f"{split} {number}")
    return dice.pick([kind for kind, often in KINDS for _ in range(often)])(dice)


def text(split: str, n_characters: int) -> str:
    """Documents of a split, with an empty line between them, until there are `n_characters` at least."""
    documents: list[str] = []
    length = 0
    while length < n_characters:
        documents.append(document(split, len(documents)))
        length += len(documents[-1]) + 2
    return "\n\n".join(documents) + "\n"
