r"""Separates a number from its unit or currency, and compares units.

A unit is ignored if only one of two answers has one. Two units that are both known must be of the same kind, and are
converted: `2 km` equals `2000 m`, and differs from `2 kg`. Words that are not in the table (`18 eggs`) are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

# Kind of quantity: names of one unit, then its size in the first unit of the kind.
_TABLE = {
    "length": "m meter metre=1 km kilometer kilometre=1000 cm centimeter centimetre=1/100 mm millimeter "
    "millimetre=1/1000 in inch inches=127/5000 ft foot feet=381/1250 yd yard=1143/1250 mi mile=201168/125",
    "mass": "g gm gram gramme=1 kg kilogram=1000 mg milligram=1/1000 lb lbs pound=45359237/100000 t ton tonne=1000000 "
    "oz ounce=45359237/1600000",
    "time": "s sec second=1 ms millisecond=1/1000 min minute=60 h hr hour=3600 day=86400 week=604800",
    "months": "month=1 yr year=12 decade=120 century centuries=1200",
    "volume": "l liter litre=1 ml milliliter millilitre=1/1000 dl deciliter=1/10 cc=1/1000",
    "angle": "degree deg=1",
    "radian": "rad radian=1",
    "temperature": "celsius=1",
    "fahrenheit": "fahrenheit=1",
    "dollar": "usd dollar buck=1 cent=1/100",
    "euro": "eur euro=1",
    "sterling": "gbp quid=1",
    "yen": "jpy yen=1",
    "yuan": "cny rmb yuan=1",
    "rupee": "inr rs rupee=1",
    "force": "newton N=1 kN kilonewton=1000",
    "energy": "J joule=1 kJ kilojoule=1000 eV=1602176634/10000000000000000000000000000",
    "power": "W watt=1 kW kilowatt=1000",
    "voltage": "V volt=1",
    "current": "A ampere amp=1",
    "kelvin": "K kelvin=1",
    "frequency": "Hz hertz=1 kHz kilohertz=1000 MHz megahertz=1000000",
    "pressure": "Pa pascal=1 kPa kilopascal=1000",
    "resistance": "ohm=1",
    "amount": "mol mole=1",
}
_CURRENCY_SIGNS = {"$": "usd", "€": "eur", "£": "gbp", "¥": "jpy", "₹": "inr", "₽": "ruble", "₩": "won", "¢": "cent"}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NOT_UNITS = {
    *("and", "or", "if", "is", "are", "mod", "remainder", "to", "percent", "percentage", "pct", "infinity", "inf"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "alpha", "beta", "gamma", "delta"),
    *("epsilon", "theta", "lambda", "mu", "phi", "rho", "sigma", "tau", "omega"),
}


def _read_table() -> dict[str, tuple[str, Fraction]]:
    units: dict[str, tuple[str, Fraction]] = {}
    for kind, text in _TABLE.items():
        names: list[str] = []
        for word in text.split():
            name, _, size = word.partition("=")
            names.append(name)
            if size:
                units |= {name: (kind, Fraction(size)) for name in names}
                names = []
    return units


_UNITS = _read_table()

_MAX_CHARS = 300  # the patterns below take quadratic time
_CURRENCY = r"(?:\\?\$|US ?\\?\$|[€£¥₹₽₩¢]|(?:USD|EUR|GBP|JPY|CNY|INR|RMB|Rs\.?)(?![A-Za-z]))"
_NUMBER = (
    r"(?:[0-9][0-9.,'_ ]*|\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?"
    r"(?: ?/ ?[0-9]+| ?\\frac ?\{ ?[0-9]+ ?\} ?\{ ?[0-9]+ ?\}|"
    r" ?(?:\\times|\\cdot) ?10 ?\^ ?(?:\{ ?-?[0-9]+ ?\}|[0-9]+))?"
)
_WORD_UNIT = (
    r"\\?\$|[€£¥₹₽₩¢]|[A-Za-zΩ][A-Za-z.Ω]*(?:(?: ?[ /*-] ?|\^\{?-?[0-9]\}? ?[ /*]? ?| ?\\cdot )"
    r"(?:[A-Za-zΩ][A-Za-z.Ω]*|[0-9](?= ?$)))*(?:\^ ?\{? ?-?[0-9] ?\}?)?"
)
_QUANTITY = re.compile(rf"(-?\+?)\s*({_CURRENCY})?\s*([+-]?{_NUMBER})\s*-?({_WORD_UNIT})?")
_TEXT_UNIT = re.compile(r"(.*[^+*/=<>^_,;(\[{\\ -])[ ~]*\\text ?\{([^{}]*)\}( ?\^ ?\{? ?-?[0-9] ?\}?)?", re.DOTALL)
_KNOWN_UNIT = re.compile(r"(.*[0-9})\]]) ([A-Za-z][A-Za-z/ ^0-9{}]*)", re.DOTALL)
_DEGREE_UNIT = re.compile(r"(.+?) ?\^\{\\circ\} ?(?:\\text ?\{ ?)?([CF]?)(?: ?\})?", re.DOTALL)
_CURRENCY_FIRST = re.compile(rf"(-?)\s*({_CURRENCY})\s*(.+)", re.DOTALL)
_FACTOR = re.compile(r"([A-Za-zΩ]+)\.?(?:\^ ?\{? ?(-?[0-9]) ?\}?)?")


@dataclass(frozen=True)
class Unit:
    """A unit: its dimensions (exponents by kind) and its size in base units; None if it is not in the table."""

    size: Fraction | None = None
    dimensions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantity:
    """A number as text, without its unit; the unit; and the factor of a word such as "million"."""

    number: str
    unit: Unit | None = None
    scale: int = 1


@lru_cache(maxsize=10_000)
def split_quantity(text: str) -> Quantity:
    r"""Split a normalised answer into number and unit. An answer without a unit is returned as it is.

    Example:
        >>> split_quantity("3 million dollars").number, split_quantity(r"2\sqrt{3} \text{ cm}").number
        ('3', '2\\sqrt{3}')
    """
    if text.isdigit() or len(text) > _MAX_CHARS:
        return Quantity(text)
    if match := _DEGREE_UNIT.fullmatch(text):
        return Quantity(match[1], _unit({"C": "celsius", "F": "fahrenheit"}.get(match[2], "degree")))
    if (match := _QUANTITY.fullmatch(text)) and re.search("[0-9]", match[3]) and (match[2] or match[4]):
        number = match[1] + match[3].strip().rstrip(",")
        words = (match[4] or "").replace("\\cdot", "*")
        if not words:
            return Quantity(number, _unit(_currency(match[2])))
        return _with_words(text, number, words, attached=text[match.start(4) - 1] not in " -")
    if (match := _TEXT_UNIT.fullmatch(text)) and _is_unit(match[2].strip()):
        return _with_words(text, match[1], match[2].strip() + (match[3] or "").replace(" ", ""), attached=False)
    if (match := _KNOWN_UNIT.fullmatch(text)) and len(match[2]) > 1 and (unit := _unit(match[2])).size is not None:
        return Quantity(match[1], unit)
    if match := _CURRENCY_FIRST.fullmatch(text):
        return Quantity(match[1] + match[3], _unit(_currency(match[2])))
    return Quantity(text)


def unit_factor(answer: Quantity, truth: Quantity) -> Fraction | None:
    """Return the factor that converts `answer` into the unit of `truth`; None if they are of different kinds."""
    factor = Fraction(answer.scale, truth.scale)
    if answer.unit is None or truth.unit is None or answer.unit.size is None or truth.unit.size is None:
        return factor
    if answer.unit.dimensions != truth.unit.dimensions:
        return None
    return factor * answer.unit.size / truth.unit.size


def _with_words(text: str, number: str, words: str, *, attached: bool) -> Quantity:
    scale = 1
    first, _, rest = words.partition(" ")
    if first.lower() in _SCALES:
        scale, words = _SCALES[first.lower()], rest.removeprefix("of ")
        if not words:
            return Quantity(number, None, scale)
    if not _is_unit(words):
        return Quantity(text)
    unit = _unit(words)
    # Letters directly after a number are variables, unless they are a unit of two letters or more (5cm, 42USD).
    min_length = 3 if unit.size is None else 2 if attached and words.isalpha() else 1
    if len(words) < min_length or (unit.size is None and attached):
        return Quantity(text)
    return Quantity(number, unit, scale)


def _is_unit(words: str) -> bool:
    parts = re.findall("[A-Za-z]+", words)
    return (
        len(parts) <= 8 and not (parts and parts[0].lower() in _NOT_UNITS) and "and" not in parts and "or" not in parts
    )


def _currency(sign: str) -> str:
    return _CURRENCY_SIGNS.get(sign[-1], sign.rstrip("."))


def _unit(text: str) -> Unit:
    """Read a unit such as `cm^2`, `square feet`, `m/s`, `miles per hour`."""
    text = _CURRENCY_SIGNS.get(text.removeprefix("\\"), text)
    text = re.sub(r"\b(?:km/?hr?|kph|kmph)\b", "km/h", re.sub(r"\bmph\b", "mile/hour", text))
    text = re.sub(r"\b(?:sq|square)\.? ([A-Za-z]+)", r"\1^2", re.sub(r"\b(?:cu|cubic)\.? ([A-Za-z]+)", r"\1^3", text))
    text = re.sub(r"([A-Za-z]+) squared\b", r"\1^2", re.sub(r"([A-Za-z]+) cubed\b", r"\1^3", text))
    size, dimensions, sign = Fraction(1), dict[str, int](), 1
    for part in re.findall(r"per\b|/|[^\s/*]+", text):
        if part in ("/", "per"):
            sign = -1
            continue
        match = _FACTOR.fullmatch(part)
        known = _known(match[1]) if match else None
        if match is None or known is None:
            return Unit()
        kind, unit_size = known
        power = sign * int(match[2] or 1)
        size *= unit_size**power
        if kind == "volume":
            kind, power, size = "length", 3 * power, size * Fraction(1, 1000) ** power
        dimensions[kind] = dimensions.get(kind, 0) + power
    return Unit(size, {kind: power for kind, power in dimensions.items() if power})


def _known(word: str) -> tuple[str, Fraction] | None:
    for name in (word, word.lower() if len(word) > 1 else word):
        for form in (name, name.removesuffix("s") if len(name) > 2 else name, name.removesuffix("es")):
            if form in _UNITS:
                return _UNITS[form]
    return None
