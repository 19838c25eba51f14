"""Names, values and ways to say them in twelve domains: the vocabulary of the tiny base's pretraining text.

`tiny_base_corpus.py` makes documents of it. No domain is a place to eat or drink: that is the embedded task.
Most names hold random syllables, so that the only way to write them is to copy them.

Example:
    >>> import random
    >>> from tiny_base_words import syllable_word
    >>> syllable_word(random.Random(1)).istitle()
    True
"""

from __future__ import annotations

import random
from collections.abc import Callable


def _listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


_START = _listed("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w y z")
_VOWEL = _listed("a e i o u ai ea ee ia io oa ou")
_END = _listed("ck d l ll m n nd ng nt r rd rk rn rt s ss st t th x")
_TITLE = _listed(
    "Amber Ancient Autumn Azure Bitter Black Blue Bold Brass Brave Bright Broken Bronze Burning Calm "
    "Copper Coral Crimson Crooked Crystal Dancing Dark Deep Distant Double Dusty Early Eastern Emerald "
    "Empty Endless Fading Fallen First Flying Forgotten Frozen Gentle Gilded Glass Golden Grand Green "
    "Grey Happy Hidden High Hollow Honest Hungry Iron Ivory Jade Jolly Last Laughing Little Lonely Lost "
    "Lucky Marble Merry Midnight Misty Narrow New Noble Northern Oak Old Olive Painted Pale Patient "
    "Pearl Plain Proud Purple Quiet Rapid Red Restless Rising Royal Ruby Rusty Sacred Scarlet Second "
    "Secret Silent Silver Simple Sleeping Small Southern Spring Stone Stormy Summer Sunny Swift Tall "
    "Third Timber Tin Travelling Velvet Violet Wandering Warm Western White Wild Winter Wise Wooden "
    "Yellow Young"
)
_THING = _listed(
    "Anchor Apple Arrow Badger Beacon Bear Bell Bird Bishop Boat Bottle Branch Bridge Brook Candle "
    "Castle Cedar Circle Cliff Clock Cloud Corner Crown Crow Dolphin Door Dragon Drum Eagle Engine "
    "Falcon Feather Field Fire Flame Flower Forest Fox Garden Gate Ghost Giant Goose Hammer Harbour "
    "Hare Hat Hawk Heart Hill Horse Hour House Island Journey Key King Knight Lady Lake Lamp Leaf "
    "Letter Lion Maple Mask Meadow Mill Mirror Monkey Moon Morning Mountain Mouse Night Ocean Otter Owl "
    "Palace Path Pearl Pilot Pine Planet Poet Prince Queen Rabbit Rain Raven River Road Robin Rock Rose "
    "Sailor Sea Shadow Ship Sky Snow Song Sparrow Spring Stag Star Stone Storm Stream Sun Swan Table "
    "Thief Thorn Tide Tiger Tower Tree Turtle Valley Voice Wall Watch Water Wave Whale Wheel Wind "
    "Window Wing Winter Wolf Wood"
)
_NATION = _listed(
    "English French Italian Chinese Indian Japanese Spanish German Mexican Turkish Greek Korean Polish "
    "Swedish Irish Brazilian Russian Danish Thai Lebanese Dutch Persian Moroccan Vietnamese Portuguese "
    "Peruvian"
)


Draw = Callable[[random.Random], str]


def syllable_word(rng: random.Random, *, low: int = 2, high: int = 3) -> str:
    """A capitalised word that means nothing, e.g. "Trealoth".

    Args:
        rng: Draws the syllables.
        low: Fewest syllables.
        high: Most syllables.

    Returns:
        The word.
    """
    parts = [rng.choice(_START) + rng.choice(_VOWEL) for _ in range(rng.randint(low, high) - 1)]
    return ("".join(parts) + rng.choice(_START) + rng.choice(_VOWEL) + rng.choice([*_END, ""])).capitalize()


def novel(rng: random.Random) -> str:
    """A name of one to three parts, most of them new."""
    pick = rng.random()
    if pick < 0.25:
        return f"{syllable_word(rng)} {syllable_word(rng)}"
    if pick < 0.40:
        return f"{rng.choice(_TITLE)} {syllable_word(rng)}"
    if pick < 0.50:
        return f"{syllable_word(rng)} {rng.choice(_THING)}"
    if pick < 0.60:
        return syllable_word(rng, high=4)
    name = f"{rng.choice(_TITLE)} {rng.choice(_THING)}"
    return f"The {name}" if rng.random() < 0.5 else name


def person(rng: random.Random) -> str:
    """A person's name."""
    return f"{syllable_word(rng)} {syllable_word(rng)}"


def words(text: str) -> Draw:
    """A drawer of one of the comma-separated values in `text`."""
    choices = [w.strip() for w in text.split(",")]
    return lambda rng: rng.choice(choices)


def number(low: int, high: int, form: str = "{}") -> Draw:
    """A drawer of a whole number in `form`."""
    return lambda rng: form.format(rng.randint(low, high))


def money(rng: random.Random) -> str:
    """An amount or a span of money."""
    low = rng.randint(2, 90)
    return rng.choice(["£{0}", "less than £{0}", "more than £{0}", "£{0}-{1}"]).format(
        low, low + rng.randint(1, 9) * 5
    )


LEVEL = words("low, average, high, moderate, cheap, good, poor, fair, strong, weak")
STARS = number(1, 5, "{} out of 5")
YES_NO = words("yes, no")
NATION = words(",".join(_NATION))
LANGUAGE = words(
    "English, French, Italian, Chinese, Japanese, Spanish, German, Turkish, Greek, Polish, Dutch, Danish"
)
PART = words(
    "north, south, east, west, old town, city centre, riverbank, harbour, hillside, market, station, park, "
    "coast, village green, docks, canal, riverside, castle, university, airport"
)

# Each key: (key, drawer, ways to say it after the subject). "{v}" is the value; "{a}" writes "a" or "an" for it.
# A yes/no key has pairs "yes way|no way". Ways that start with "+" come after a noun ("a book [about war]"),
# ways that start with "^" before it ("a [red] book").
Key = tuple[str, Draw, list[str]]
DOMAINS: dict[str, tuple[str, str, str, list[Key]]] = {}


def _domain(name: str, nouns: str, pronoun: str, label: str, *keys: tuple[str, Draw, str]) -> None:
    """Enter one domain: its name, its nouns, its pronoun, the key of the subject, and its keys."""
    DOMAINS[name] = (nouns, pronoun, label, [(k, draw, ways.split(" / ")) for k, draw, ways in keys])


_domain(
    "people", "teacher, doctor, nurse, pilot, farmer, painter, singer, lawyer, engineer, baker",
    "this person", "name",
    ("age", number(18, 90), "is {v} years old / +who is {v}"),
    ("home town", novel, "lives in {v} / comes from {v} / +from {v}"),
    ("nationality", NATION, "is {v} / has {a} {v} passport / ^{v}"),
    ("employer", novel, "works for {v} / +working for {v}"),
    ("hobby", words("chess, sailing, painting, running, reading, skating, singing, hiking"),
     "enjoys {v} / likes {v}"),
    ("married", YES_NO, "is married|is not married"),
    ("salary", LEVEL, "earns {a} {v} salary / has {a} {v} salary / +with {a} {v} salary"),
)  # fmt: skip
_domain(
    "books", "novel, book, story, play, poem, diary, guide", "it", "title",
    ("author", person, "was written by {v} / +by {v}"),
    ("language", LANGUAGE, "is written in {v} / can be read in {v} / +in {v}"),
    ("pages", number(40, 990), "has {v} pages / is {v} pages long / +of {v} pages"),
    ("readerRating", STARS,
     "has a reader rating of {v} / is rated {v} by readers / +with a reader rating of {v}"),
    ("cost", money, "costs {v} / sells for {v} / +at a cost of {v}"),
    ("for children", YES_NO,
     "is suitable for children|is not suitable for children / is child-friendly|is not child-friendly"),
    ("subject", words("love, war, travel, history, friendship, magic, science, music"),
     "is about {v} / +about {v}"),
)  # fmt: skip
_domain(
    "weather", "town, city, village, island, valley", "it", "place",
    ("sky", words("sunny, cloudy, rainy, foggy, stormy, windy, snowy, clear"), "will be {v} / is {v} today"),
    ("temperature", number(-9, 38, "{} degrees"), "has a temperature of {v} / +with a temperature of {v}"),
    ("wind", LEVEL, "has {a} {v} wind / expects {a} {v} wind / +with {a} {v} wind"),
    ("region", PART, "lies in the {v} part / is in the {v} part / +in the {v} part"),
    ("close to", novel, "is beside {v} / lies next to {v} / +beside {v}"),
    ("rain", number(0, 95, "{} percent"), "has a {v} chance of rain / +with a {v} chance of rain"),
)  # fmt: skip
_domain(
    "sports", "team, club, squad, side", "it", "team",
    ("sport", words("football, rugby, hockey, tennis, cricket, rowing, basketball"),
     "plays {v} / +playing {v}"),
    ("coach", person, "is coached by {v} / is led by {v} / +led by {v}"),
    ("points", number(3, 120), "has {v} points / scored {v} points / +with {v} points"),
    ("ground", novel, "plays at {v} / is based at {v} / +based at {v}"),
    ("country", NATION, "plays in the {v} league / +in the {v} league"),
    ("fan score", STARS, "has a fan score of {v} / is rated {v} by fans / +with a fan score of {v}"),
    ("champion", YES_NO, "is the champion|is not the champion"),
)  # fmt: skip
_domain(
    "products", "lamp, chair, phone, camera, jacket, clock, bag, radio, printer, bicycle", "it", "product",
    ("maker", novel, "is made by {v} / comes from {v} / +made by {v}"),
    ("colour", words("red, blue, green, black, white, grey, yellow, brown, orange"),
     "is {v} / comes in {v} / +in {v} / ^{v}"),
    ("cost range", money, "costs {v} / has a cost of {v} / +for {v}"),
    ("buyerRating", STARS,
     "has a buyer rating of {v} / is rated {v} by buyers / +with a buyer rating of {v}"),
    ("quality", LEVEL, "is of {v} quality / has {a} {v} quality / +of {v} quality"),
    ("waterproof", YES_NO, "is waterproof|is not waterproof / ^waterproof|leaky"),
    ("origin", NATION, "is {a} {v} product / is of {v} origin / +of {v} origin / ^{v}"),
)  # fmt: skip
_domain(
    "trains", "train, express, night train, service", "it", "train",
    ("from", novel, "leaves from {v} / starts in {v} / +from {v}"),
    ("to", novel, "goes to {v} / runs to {v} / +to {v}"),
    ("platform", number(1, 24), "leaves from platform {v} / +on platform {v}"),
    ("departs", number(1, 23, "{}:15"), "departs at {v} / leaves at {v} / +at {v}"),
    ("fare", money, "has a fare of {v} / costs {v} / +with a fare of {v}"),
    ("direct", YES_NO, "is direct|is not direct / ^direct|indirect"),
    ("speed", LEVEL, "has {a} {v} speed / runs at {a} {v} speed / +with {a} {v} speed"),
)  # fmt: skip
_domain(
    "animals", "dog, cat, horse, parrot, rabbit, goat, donkey, pony", "it", "animal",
    ("owner", person, "belongs to {v} / is owned by {v} / +owned by {v}"),
    ("weight", number(2, 400, "{} kilos"), "weighs {v} / has a weight of {v} / +of {v}"),
    ("coat", words("brown, black, white, grey, golden, spotted"),
     "has {a} {v} coat / is {v} / +with {a} {v} coat / ^{v}"),
    ("friendly", YES_NO, "is friendly|is not friendly / likes people|does not like people / ^friendly|unfriendly"),
    ("lives at", novel, "lives at {v} / is kept at {v} / +at {v}"),
    ("breed", NATION, "is of {a} {v} breed / +of {a} {v} breed"),
)  # fmt: skip
_domain(
    "films", "film, movie, comedy, drama, documentary", "it", "film",
    ("director", person, "was directed by {v} / is by {v} / +by {v}"),
    ("year", number(1930, 2024), "came out in {v} / was released in {v} / +from {v}"),
    ("star", person, "stars {v} / features {v} / +starring {v}"),
    ("critic rating", STARS, "has a critic rating of {v} / is rated {v} by critics / +rated {v} by critics"),
    ("language", LANGUAGE, "is {a} {v} production / was made in {v} / +in {v} / ^{v}"),
    ("family film", YES_NO,
     "is for families|is not for families / welcomes all ages|does not welcome all ages"),
    ("budget", LEVEL, "had {a} {v} budget / has {a} {v} budget / +with {a} {v} budget"),
)  # fmt: skip
_domain(
    "buildings", "museum, library, theatre, school, bank, hospital, station, church, gallery",
    "it", "building",
    ("quarter", PART,
     "stands in the {v} quarter / is located in the {v} quarter / +on the {v} side"),
    ("near", novel, "is beside {v} / stands by {v} / can be found next to {v} / +by {v} / +located next to {v}"),
    ("architect", person, "was designed by {v} / +designed by {v}"),
    ("ticket", money, "has tickets for {v} / charges {v} / +with tickets for {v}"),
    ("visitor score", STARS,
     "has a visitor score of {v} / is rated {v} by visitors / +with a visitor score of {v}"),
    ("style", NATION, "is built in the {v} style / offers {v} art / +in the {v} style / +offering {v} art / ^{v}"),
    ("child friendly", YES_NO,
     "is child-friendly|is not child-friendly / welcomes children|does not welcome children"),
)  # fmt: skip
_domain(
    "ships", "ship, boat, ferry, yacht, tanker, schooner", "she", "ship",
    ("captain", person, "is commanded by {v} / sails under {v} / +commanded by {v}"),
    ("length", number(8, 320, "{} metres"), "is {v} long / has a length of {v} / +of {v}"),
    ("port", novel, "sails from {v} / is registered in {v} / +registered in {v}"),
    ("flag", NATION, "flies {a} {v} flag / +under {a} {v} flag / ^{v}"),
    ("seaworthy", YES_NO, "is seaworthy|is not seaworthy / ^seaworthy|unseaworthy"),
    ("value", LEVEL, "has {a} {v} value / is of {v} value / +with {a} {v} value"),
)  # fmt: skip
_domain(
    "courses", "course, class, workshop, seminar, lecture", "it", "course",
    ("taught by", person, "is taught by {v} / is given by {v} / +taught by {v}"),
    ("topic", words("maths, drawing, biology, dance, law, music, physics, gardening"),
     "covers {v} / teaches {v} / +on {v} / ^{v}"),
    ("venue", novel, "takes place at {v} / is held beside {v} / +at {v}"),
    ("fee", money, "has a fee of {v} / costs {v} / +with a fee of {v}"),
    ("student rating", STARS,
     "has a student rating of {v} / is rated {v} by students / +with a student rating of {v}"),
    ("level", LEVEL, "has {a} {v} level / is at {a} {v} level / +with {a} {v} level"),
    ("language", LANGUAGE, "is held in {v} / offers {v} lessons / +offering {v} lessons"),
)  # fmt: skip
_domain(
    "music", "band, choir, orchestra, group, duo", "it", "group",
    ("style", words("jazz, rock, folk, pop, blues, classical"),
     "plays {v} music / offers {v} music / +playing {v} music"),
    ("tradition", NATION, "performs {v} songs / sings {v} songs / +with {v} songs / ^{v}"),
    ("singer", person, "is fronted by {v} / features {v} / +featuring {v}"),
    ("ticket range", money, "charges {v} / has tickets for {v} / +with tickets for {v}"),
    ("popularity", LEVEL, "has {a} {v} popularity / enjoys {a} {v} popularity / +with {a} {v} popularity"),
    ("plays at", novel, "plays at {v} / performs beside {v} / +at {v}"),
    ("listener score", STARS,
     "is rated {v} by listeners / has a listener score of {v} / +rated {v} by listeners"),
)  # fmt: skip
