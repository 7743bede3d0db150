r"""Separates a number from its unit or currency, and compares units.

A unit is ignored if only one of two answers has one. Two units that are both known must be of the same kind, and are
converted: `2 km` equals `2000 m`, `1 N` equals `1 kg m/s^2`, and `2 km` differs from `2 kg`. Words that are not in the
table (`18 eggs`) are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

# The units of each kind of quantity: all names of a unit, `=`, its size in the first unit of the kind. So
# "m meter=1 km=1000" says that `m` and `meter` are one unit, and that `km` is 1000 of it.
_TABLE = {
    "length": "m meter metre=1 km kilometer kilometre=1000 dm decimeter decimetre=1/10 cm centimeter centimetre=1/100 "
    "mm millimeter millimetre=1/1000 um micrometer micrometre micron=1/1000000 nm nanometer nanometre=1/1000000000 "
    "in inch inches=127/5000 ft foot feet=381/1250 yd yard=1143/1250 mi mile=201168/125",
    "mass": "g gm gram gramme=1 kg kilogram=1000 mg milligram=1/1000 lb lbs pound=45359237/100000 t ton tonne=1000000 "
    "oz ounce=45359237/1600000",
    "time": "s sec second=1 ms millisecond=1/1000 min minute=60 h hr hour=3600 day=86400 week=604800",
    "months": "month=1 yr year=12 decade=120 century centuries=1200",
    "area": "ha hectare=1 acre=316160658/781250000",
    "volume": "l L liter litre=1 ml milliliter millilitre=1/1000 dl deciliter=1/10 cc=1/1000",
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
    "energy": "J joule=1 kJ kilojoule=1000 MJ megajoule=1000000 Wh=3600 kWh=3600000 cal calorie=523/125 "
    "kcal kilocalorie=4184 eV=1602176634/10000000000000000000000000000",
    "power": "W watt=1 kW kilowatt=1000",
    "voltage": "V volt=1",
    "current": "A ampere amp=1",
    "kelvin": "K kelvin=1",
    "frequency": "Hz hertz=1 kHz kilohertz=1000 MHz megahertz=1000000",
    "pressure": "Pa pascal=1 kPa kilopascal=1000",
    "resistance": "ohm=1",
    "amount": "mol mole=1",
}
# Kinds that are products of others: exponents, and the size of the first unit in the first units of these.
_PRODUCTS = {
    "area": ({"length": 2}, Fraction(10_000)),
    "volume": ({"length": 3}, Fraction(1, 1000)),
    "frequency": ({"time": -1}, Fraction(1)),
    "force": ({"mass": 1, "length": 1, "time": -2}, Fraction(1000)),
    "pressure": ({"mass": 1, "length": -1, "time": -2}, Fraction(1000)),
    "energy": ({"mass": 1, "length": 2, "time": -2}, Fraction(1000)),
    "power": ({"mass": 1, "length": 2, "time": -3}, Fraction(1000)),
    "voltage": ({"mass": 1, "length": 2, "time": -3, "current": -1}, Fraction(1000)),
    "resistance": ({"mass": 1, "length": 2, "time": -3, "current": -2}, Fraction(1000)),
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
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # their degrees are no unit of the value
_CURRENCY_FIRST = re.compile(rf"(-?)\s*({_CURRENCY})\s*(.+)", re.DOTALL)
_MICRO = re.compile(r"^(-?[0-9.,]+) ?\\mu ?([mgsl])$")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)\.?")  # of a compound quantity
_BETWEEN_PARTS = re.compile(r" (?:and )?(?=[0-9])")
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
    text = _MICRO.sub(r"\1 u\2", text)
    if quantity := _compound(text):
        return quantity
    if (match := _DEGREE_UNIT.fullmatch(text)) and not _TRIGONOMETRIC.search(text):
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


def _compound(text: str) -> Quantity | None:
    """Read a quantity in several units, from the largest to the smallest: `2 hours 30 minutes`, `5 ft 10 in`."""
    parts = [_PART.fullmatch(part) for part in _BETWEEN_PARTS.split(text)]
    if len(parts) < 2:
        return None
    total, units = Fraction(0), list[Unit]()
    for part in parts:
        unit = _unit(part[2]) if part else Unit()
        if part is None or unit.size is None:
            return None
        if units and (unit.dimensions != units[0].dimensions or unit.size >= (units[-1].size or 0)):
            return None
        units.append(unit)
        total += Fraction(part[1]) * unit.size
    total /= units[0].size or 1
    return Quantity(str(total), units[0])


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
        factors, base_size = _PRODUCTS.get(kind, ({kind: 1}, Fraction(1)))
        size *= (unit_size * base_size) ** power
        for factor, exponent in factors.items():
            dimensions[factor] = dimensions.get(factor, 0) + power * exponent
    return Unit(size, {kind: power for kind, power in dimensions.items() if power})


def _known(word: str) -> tuple[str, Fraction] | None:
    for name in (word, word.lower() if len(word) > 1 else word):
        for form in (name, name.removesuffix("s") if len(name) > 2 else name, name.removesuffix("es")):
            if form in _UNITS:
                return _UNITS[form]
    return None
