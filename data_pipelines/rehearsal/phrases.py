"""What the rehearsal says: a few words and sentences in six languages, from a grammar small enough to be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class Language:
    """Words in the order of COLORS, SHAPES and DIRECTIONS, and the sentences that they go into.

    A shape is its article, its noun, and which form of a color it takes; a color with one form has it for all.
    """

    voice: str  # of espeak-ng
    digits: tuple[str, ...]
    colors: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[str, str, int], ...]
    directions: tuple[str, ...]
    thing: str  # with {article}, {noun} and {color}
    moves: str  # with {thing} and {direction}
    commands: tuple[str, ...]
    after: str  # a question about the digit {word}
    before: str
    larger: str  # a question about the digits {one} and {other}
    write_down: str  # the instruction to transcribe
    quoted: str  # the same about the text {text}
    say: str  # the instruction to say {text}
    repeat: str  # the instruction to say what is heard
    see: str  # a question about a picture
    separator: str = " "  # between digits
    comma: str = ", "  # between phrases
    stop: str = ". "  # after a sentence

    def color(self, color: str, form: int = 0) -> str:
        forms = self.colors[COLORS.index(color)]
        return forms[form if len(forms) > 1 else 0]

    def name(self, color: str, shape: str) -> str:
        """``the red circle``."""
        article, noun, form = self.shapes[SHAPES.index(shape)]
        return self.thing.format(article=article, noun=noun, color=self.color(color, form))

    def motion(self, color: str, shape: str, direction: str) -> str:
        """``the red circle moves left``."""
        return self.moves.format(thing=self.name(color, shape), direction=self.directions[DIRECTIONS.index(direction)])

    def number(self, digits: tuple[int, ...]) -> str:
        """Digits as they are read out."""
        return self.separator.join(self.digits[digit] for digit in digits)

    def units(self) -> list[str]:
        """What can stand beside anything: digits, colors, shapes, directions and commands.

        A color has one form here, as two may sound alike, and no ear could tell which was meant.
        """
        shapes = (f"{article.strip()} {noun}".strip().replace("' ", "'") for article, noun, _ in self.shapes)
        return [*self.digits, *(forms[0] for forms in self.colors), *shapes, *self.directions, *self.commands]

    def sentences(self, phrases: list[str]) -> str:
        """Phrases as sentences, one after the other."""
        return self.stop.join([*phrases, ""]).strip()


LANGUAGES = {
    "en": Language(
        voice="en-us",
        digits=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        colors=(("red",), ("green",), ("blue",), ("yellow",), ("purple",), ("orange",)),
        shapes=(
            ("the", "circle", 0),
            ("the", "square", 0),
            ("the", "triangle", 0),
            ("the", "star", 0),
            ("the", "cross", 0),
        ),
        directions=("left", "right", "up", "down"),
        thing="{article} {color} {noun}",
        moves="{thing} moves {direction}",
        commands=("open the window", "close the door", "turn on the light", "wait a moment", "good morning"),
        after="what comes after {word}?",
        before="what comes before {word}?",
        larger="which is larger, {one} or {other}?",
        write_down="Write down what you hear.",
        quoted="Somebody says: {text}. Write it down.",
        say="Say: {text}",
        repeat="Repeat what you hear.",
        see="What do you see?",
    ),
    "de": Language(
        voice="de",
        digits=("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
        colors=(("rote",), ("grüne",), ("blaue",), ("gelbe",), ("violette",), ("orange",)),
        shapes=(
            ("der", "Kreis", 0),
            ("das", "Quadrat", 0),
            ("das", "Dreieck", 0),
            ("der", "Stern", 0),
            ("das", "Kreuz", 0),
        ),
        directions=("links", "rechts", "oben", "unten"),
        thing="{article} {color} {noun}",
        moves="{thing} geht nach {direction}",
        commands=("öffne das Fenster", "schließ die Tür", "mach das Licht an", "warte einen Moment", "guten Morgen"),
        after="was kommt nach {word}?",
        before="was kommt vor {word}?",
        larger="was ist größer, {one} oder {other}?",
        write_down="Schreib auf, was du hörst.",
        quoted="Jemand sagt: {text}. Schreib es auf.",
        say="Sag: {text}",
        repeat="Sprich nach, was du hörst.",
        see="Was siehst du?",
    ),
    "fr": Language(
        voice="fr",
        digits=("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
        colors=(("rouge",), ("vert", "verte"), ("bleu", "bleue"), ("jaune",), ("violet", "violette"), ("orange",)),
        shapes=(
            ("le ", "cercle", 0),
            ("le ", "carré", 0),
            ("le ", "triangle", 0),
            ("l'", "étoile", 1),
            ("la ", "croix", 1),
        ),
        directions=("à gauche", "à droite", "vers le haut", "vers le bas"),
        thing="{article}{noun} {color}",
        moves="{thing} va {direction}",
        commands=("ouvre la fenêtre", "ferme la porte", "allume la lumière", "attends un moment", "bonjour à tous"),
        after="qu'est-ce qui vient après {word} ?",
        before="qu'est-ce qui vient avant {word} ?",
        larger="lequel est plus grand, {one} ou {other} ?",
        write_down="Écris ce que tu entends.",
        quoted="Quelqu'un dit : {text}. Écris-le.",
        say="Dis : {text}",
        repeat="Répète ce que tu entends.",
        see="Que vois-tu ?",
    ),
    "es": Language(
        voice="es",
        digits=("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
        colors=(("rojo", "roja"), ("verde",), ("azul",), ("amarillo", "amarilla"), ("morado", "morada"), ("naranja",)),
        shapes=(
            ("el", "círculo", 0),
            ("el", "cuadrado", 0),
            ("el", "triángulo", 0),
            ("la", "estrella", 1),
            ("la", "cruz", 1),
        ),
        directions=("a la izquierda", "a la derecha", "hacia arriba", "hacia abajo"),
        thing="{article} {noun} {color}",
        moves="{thing} va {direction}",
        commands=("abre la ventana", "cierra la puerta", "enciende la luz", "espera un momento", "buenos días"),
        after="¿qué viene después de {word}?",
        before="¿qué viene antes de {word}?",
        larger="¿cuál es mayor, {one} o {other}?",
        write_down="Escribe lo que oyes.",
        quoted="Alguien dice: {text}. Escríbelo.",
        say="Di: {text}",
        repeat="Repite lo que oyes.",
        see="¿Qué ves?",
    ),
    "it": Language(
        voice="it",
        digits=("zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"),
        colors=(("rosso", "rossa"), ("verde",), ("blu",), ("giallo", "gialla"), ("viola",), ("arancione",)),
        shapes=(
            ("il", "cerchio", 0),
            ("il", "quadrato", 0),
            ("il", "triangolo", 0),
            ("la", "stella", 1),
            ("la", "croce", 1),
        ),
        directions=("a sinistra", "a destra", "in alto", "in basso"),
        thing="{article} {noun} {color}",
        moves="{thing} va {direction}",
        commands=("apri la finestra", "chiudi la porta", "accendi la luce", "aspetta un momento", "buongiorno a tutti"),
        after="cosa viene dopo {word}?",
        before="cosa viene prima di {word}?",
        larger="quale è maggiore, {one} o {other}?",
        write_down="Scrivi quello che senti.",
        quoted="Qualcuno dice: {text}. Scrivilo.",
        say="Di': {text}",
        repeat="Ripeti quello che senti.",
        see="Cosa vedi?",
    ),
    "zh": Language(
        voice="cmn",
        digits=("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
        colors=(("红色",), ("绿色",), ("蓝色",), ("黄色",), ("紫色",), ("橙色",)),
        shapes=(
            ("", "圆形", 0),
            ("", "方形", 0),
            ("", "三角形", 0),
            ("", "星形", 0),
            ("", "十字形", 0),
        ),
        directions=("左", "右", "上", "下"),
        thing="{color}的{noun}",
        moves="{thing}向{direction}移动",
        commands=("打开窗户", "关上门", "请开灯", "等一下", "早上好"),
        after="{word}后面是什么？",
        before="{word}前面是什么？",
        larger="{one}和{other}哪个大？",
        write_down="写下你听到的话。",
        quoted="有人说：{text}。请写下来。",
        say="请说：{text}",
        repeat="重复你听到的话。",
        see="你看到了什么？",
        separator="",
        comma="，",
        stop="。",
    ),
}


def utterance(random: Random, code: str | None = None) -> tuple[str, str, str]:
    """A language, the one that is given or else any, the kind of what is said, and its words."""
    code = code or random.choice(list(LANGUAGES))
    language = LANGUAGES[code]
    kind = random.choices(("digit", "digits", "color", "name", "motion", "command"), (2, 3, 1, 2, 2, 1))[0]
    color, shape, direction = random.choice(COLORS), random.choice(SHAPES), random.choice(DIRECTIONS)
    words: dict[str, Callable[[], str]] = {
        "digit": lambda: language.number((random.randrange(10),)),
        "digits": lambda: language.number(tuple(random.choices(range(10), k=random.choice((2, 3))))),
        "color": lambda: language.color(color),
        "name": lambda: language.name(color, shape),
        "motion": lambda: language.motion(color, shape, direction),
        "command": lambda: random.choice(language.commands),
    }
    return code, kind, words[kind]()


class Question(NamedTuple):
    """A question about digits: a name of its own, its language, its words, and the answer, a digit."""

    name: str
    language: str
    words: str
    answer: str


def questions() -> Iterator[Question]:
    """All there are."""
    for code, language in LANGUAGES.items():
        for digit, word in enumerate(language.digits):
            if digit < 9:
                yield Question(f"{code}-after-{digit}", code, language.after.format(word=word), str(digit + 1))
            if digit > 0:
                yield Question(f"{code}-before-{digit}", code, language.before.format(word=word), str(digit - 1))
            for other in (n for n in range(10) if n != digit):
                words = language.larger.format(one=word, other=language.digits[other])
                yield Question(f"{code}-larger-{digit}-{other}", code, words, str(max(digit, other)))
