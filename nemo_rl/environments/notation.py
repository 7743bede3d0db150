r"""Rewrites the notations that models and data sets use for one answer into one LaTeX spelling.

`normalise` removes what does not change a value: Unicode variants of ASCII characters; Markdown, HTML and LaTeX
decoration. `plain_to_latex` translates the notation of programs (`sqrt(2)`, `2*pi`, `exp(x)`), which only the
verifier needs. Both take time linear in the length of the text.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

# Unicode

_INVISIBLE = re.compile("[\u00ad\u0305\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe0e\ufe0f\ufeff]")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GREEK = (  # noqa: SIM905
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau "
    "upsilon phi chi psi omega"
).split()
_CHARACTERS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2796\ufe58\ufe63\uff0d", "-"),
    **{chr(ord("α") + position): f"\\{name} " for position, name in enumerate(_GREEK)},
    "×": "\\times ", "✕": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ", "∗": "*", "÷": "/", "⁄": "/",
    "∕": "/", "∞": "\\infty ", "≤": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "⩾": "\\geq ", "≠": "\\neq ",
    "≈": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "∶": ":", "°": "^{\\circ}", "º": "^{\\circ}", "˚": "^{\\circ}",
    "℃": "^{\\circ}C", "℉": "^{\\circ}F", "′": "'", "‘": "'",
    "’": "'", "“": '"', "”": '"', "٪": "%", "٫": ".", "٬": ",", "،": ",", "、": ",", "…": "\\ldots ",
    "⟨": "\\langle ", "⟩": "\\rangle ", "µ": "μ", "Δ": "\\Delta ", "Ω": "Ω",
}  # fmt: skip
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"
_OVERLINED = re.compile("(?:[0-9][\u0304\u0305])+")
_DOTTED = re.compile("([0-9])\u0307(?:([0-9]*[0-9])\u0307)?")
_SMALL_FRACTION = re.compile(rf"(?<![{_SUPERSCRIPTS}])([{_SUPERSCRIPTS[:10]}]+)[⁄/∕]([{_SUBSCRIPTS[:10]}]+)")
_SCRIPTS = re.compile(rf"[{_SUPERSCRIPTS}]+|[{_SUBSCRIPTS}]+")
_ROOT = re.compile(r"([√∛∜])\s*([0-9]+(?:\.[0-9]+)?|\\[a-z]+|[A-Za-z](?![A-Za-z]))?")
_ROOT_DEGREES = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}

# Markup

_HTML_TAG = re.compile(
    r"</?(?:a|b|big|center|code|div|em|font|h[1-6]|i|kbd|li|mark|p|pre|q|small|span|strong|tt|u)(?:\s[^<>]*)?/?>", re.I
)
_HTML_FRACTION = re.compile(r"<sup>([^<>]*)</sup>\s*(?:/|\u2044|&frasl;)\s*<sub>([^<>]*)</sub>", re.I)
_HTML_SCRIPT = re.compile(r"<(sup|sub)>([^<>]*)</\1>", re.I)
_HTML_BREAK = re.compile(r"<br\s*/?>", re.I)
_HTML_ENTITY = re.compile(r"&#?[0-9A-Za-z]{2,8};")
_BOLD = re.compile(r"(?<![^\s(])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![^\s.,;:)])")
_MARKDOWN_WRAPPERS = ("```", "``", "`", "***", "**", "*", "___", "__", "_", "~~", '"', "'")
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final )?answer ?(?:is|:|=)+ ?:? ?|"
    r"(?:approximately|approx\.|about|roughly) (?=[^A-Za-z]|$)",
    re.I,
)
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_LEADING_RELATION = re.compile(r"^(?:=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])|~) ?")

# LaTeX

_TOKEN = re.compile(r"\\\\(?:\[[^\[\]]{0,20}\])?|\\(?:[A-Za-z]+\*?|.)|[{}]", re.DOTALL)
_SPACING = re.compile(r"(?:\\[,;:> ]|\\q?quad(?![A-Za-z])|\\(?:en|thin|med|thick)space(?![A-Za-z])|~|\s)+")
_WORD_FONTS = _names("mathrm text textrm textnormal textup mbox hbox operatorname textsf texttt mathop")
_FONTS = _names(
    "boldsymbol bm pmb mathbf mathit mathsf mathtt mathnormal emph textbf textit textsl underline ensuremath boxed "
    "fbox framebox bbox mathstrut"
)
_COLOURED = {"textcolor": 1, "colorbox": 1, "mathcolor": 1, "fcolorbox": 2}  # number of colours before the content
_DROPPED_WITH_ARGUMENT = _names("color hspace vspace phantom hphantom vphantom tag label")
_SWITCHES = _names(
    "bf it rm sf tt sl bfseries itshape rmfamily sffamily ttfamily displaystyle textstyle scriptstyle "
    "scriptscriptstyle tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge"
)
_SIZES = frozenset(f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "m", "r"))
_DROPPED = (
    _names(
        "left right middle mleft mright limits nolimits noindent centering therefore blacksquare qedsymbol checkmark"
    )
    | _SIZES
)
_RENAMED = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "sfrac": "\\frac", "nicefrac": "\\frac",
    "le": "\\leq", "ge": "\\geq", "ne": "\\neq",
    "leqslant": "\\leq", "geqslant": "\\geq", "varnothing": "\\emptyset", "lbrace": "\\{", "rbrace": "\\}",
    "lbrack": "[", "rbrack": "]", "lt": "<", "gt": ">", "R": "\\mathbb{R}", "degree": "^{\\circ}",
    "textdegree": "^{\\circ}", "textdollar": "\\$", "lvert": "|", "rvert": "|", "vert": "|", "dots": "\\ldots",
    "tg": "\\tan", "ctg": "\\cot", "arctg": "\\arctan", "pounds": "£", "euro": "€", "EUR": "€",
    "tbinom": "\\binom", "dbinom": "\\binom", "(": "", ")": "", "[": "", "]": "", "!": "", "*": "",
}  # fmt: skip
_FUNCTIONS = _names("sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log exp gcd lcm max min det")
_UNIT_LETTERS = frozenset("mgshLlNJWVAKCFP")
_NUMBER_OR_CHOICE = re.compile(r"[+-]?\.?[0-9]|\(?[A-J][).]?$")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_GROUPED_IN_BRACES = re.compile(r"\{ ?[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)? ?\}")  # not a set
_DEGREES = re.compile(r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))")
_ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{(?:align|aligned|equation|gather|gathered|displaymath|math)\*?\}")
_BARE_BLACKBOARD = re.compile(r"\\mathbb ([A-Z])(?![A-Za-z])")
_CHOOSE = re.compile(r"\{ ?([^{}]+?) ?\\choose ?([^{}]+?) ?\}")
_BARE_BINOMIAL = re.compile(r"\\binom ?([0-9]) ?([0-9])")
_BRACKETED_DIGITS = re.compile(r"\(([0-9A-F]+)\)(?=_)")  # the number in (1011)_2
_BARE_FRACTION = re.compile(r"\\frac ?(\{[^{}]*\}|[0-9A-Za-z]) ?(\{|[0-9A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt ?(\[[^\[\]]*\])? ?([0-9]|(?<= |\])[A-Za-z])")

_LATEX_DOTTED = re.compile(r"\\dot ?\{? ?([0-9]) ?\}?(?:([0-9]*)\\dot ?\{? ?([0-9]) ?\}?)?")
# Other notations for the period of a decimal: 0.(3), and 0.333... with a period that is written three times.
_PERIOD_IN_BRACKETS = re.compile(r"([+-]? ?[0-9]*)[.,]([0-9]*)\(([0-9]+)\)")
_WRITTEN_PERIOD = re.compile(r"([+-]? ?[0-9]*\.[0-9]*?)([0-9]{1,9}?)\2\2+ ?(?:\.\.\.|\\[lc]?dots) ?")
_MAX_DECIMAL_CHARS = 100  # the patterns above take quadratic time

# Plain notation

_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(a(?:rc)?(?:sin|cos|tan)|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|sqrt|cbrt|exp|abs|floor|"
    r"ceil)(?= ?\()|\\sqrt(?= ?\()|\^(?= ?\()"
)
_PLAIN_CONSTANT = re.compile(
    rf"(?<![A-Za-z\\])(?:({'|'.join(sorted(_GREEK, key=len, reverse=True))})|(infinity|infty|inf|oo))(?![A-Za-z])"
)
_PLAIN_NAME = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln)(?=[ ^_\\0-9])"
)
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt ?([0-9]+)")
_PLAIN_POWER = re.compile(r"\^ ?([+-]?[0-9]+(?:\.[0-9]+)?)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]{1,3})(?![A-Za-z0-9.])")
_PLAIN_FRACTION = re.compile(r"(?<![0-9A-Za-z.,/^_)}\]])([0-9]+) ?/ ?([0-9]+)(?= ?(?:\\[a-z]|[A-Za-z(]))")
_SPACED_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")
_MIXED_NUMBER = re.compile(r"(?<![0-9.,/])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9])")
_PLAIN_MATRIX = re.compile(r"\[ ?(\[[^\[\]]*\](?: ?, ?\[[^\[\]]*\])+) ?\]")
_TIMES_POWER = re.compile(r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREE_VALUE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?\^\{\\circ\}")
_PLAIN_OPERATORS = (
    (re.compile(r"<= ?"), "\\\\leq "),
    (re.compile(r">= ?"), "\\\\geq "),
    (re.compile(r"!= ?"), "\\\\neq "),
    (re.compile(r"\+ ?/? ?- ?(?=[0-9\\(A-Za-z])"), "\\\\pm "),
    (re.compile(r"\+ ?\\infty"), "\\\\infty"),
    (re.compile(r"(?<=[\])]) ?[Uu] ?(?=[\[(])"), " \\\\cup "),
    (re.compile(r" ?\* ?"), " \\\\cdot "),
)


def normalise(answer: str) -> str:
    """Return one spelling for answers that differ only in typography and decoration. Idempotent on plain numbers.

    Example:
        >>> normalise("**−½**"), normalise("{\\\\bf 1 000}."), normalise("x²")
        ('-\\\\frac{1}{2}', '1 000', 'x^{2}')
    """
    text = answer.strip()
    if text.isascii() and text.isalnum():
        return text
    if text.replace(" ", "") in ("{}", "\\{\\}"):
        return "\\emptyset"
    if "<" in text or "&" in text:
        text = _without_html(text)
    if not text.isascii():
        text = ascii_characters(text)
    text = _BOLD.sub(r"\1", text).strip()
    text = _without_wrappers(text)
    text = text.replace("**", "^")
    text = _without_latex_decoration(text.replace("{,}", ","))
    text = _strip_ends(_with_overline(_SPACING.sub(" ", text)))
    words = _TEXT.match(text)
    if words and (words.end() == len(text) or _LEAD_IN.fullmatch(words[1])):  # all of the answer, or before it
        text = words[1] + text[words.end() :]
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    text = _strip_ends(_LEADING_RELATION.sub("", _without_wrappers(text)))
    return _BRACKETED_DIGITS.sub(r"\1", text)


def ascii_characters(text: str) -> str:
    """Replace Unicode variants of digits, signs, spaces, fractions, roots and scripts by ASCII or LaTeX."""
    text = _OVERLINED.sub(lambda m: f"\\overline{{{m[0][::2]}}}", text)
    text = _DOTTED.sub(lambda m: f"\\overline{{{m[1]}{m[2] or ''}}}", text)
    text = _INVISIBLE.sub("", text)
    text = _SMALL_FRACTION.sub(lambda m: f"\\frac{{{_compatible(m[1])}}}{{{_compatible(m[2])}}}", text)
    text = _SCRIPTS.sub(
        lambda m: f"{'^' if m[0][0] in _SUPERSCRIPTS else '_'}{{{_compatible(m[0]).replace(chr(0x2212), '-')}}}", text
    )
    text = "".join(character if character < "\x80" else _ascii(character) for character in text)
    return _ROOT.sub(lambda m: _ROOT_DEGREES[m[1]] + (f"{{{m[2]}}}" if m[2] else ""), text)


def plain_to_latex(text: str) -> str:
    """Translate plain notation in a normalised answer: functions, constants, powers, products and comparisons."""
    text = _SPACED_GROUPS.sub(lambda m: m[0].replace(" ", ""), text)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = _bracketed_arguments(text)
    text = _PLAIN_NAME.sub(r"\\\1 ", text)
    text = _PLAIN_FRACTION.sub(r"\\frac{\1}{\2}", text)
    if matrix := _PLAIN_MATRIX.fullmatch(text):
        rows = "\\\\".join(re.findall(r"\[([^\[\]]*)\]", matrix[1])).replace(",", "&")
        text = f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SCIENTIFIC.sub(lambda m: f"{m[1]} \\times 10^{{{int(m[2])}}}", text)
    text = _TIMES_POWER.sub(r" \\times ", text)
    text = _PLAIN_POWER.sub(r"^{\1}", text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREE_VALUE.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _PLAIN_CONSTANT.sub(lambda m: f"\\{m[1]} " if m[1] else "\\infty ", text)
    for pattern, latex in _PLAIN_OPERATORS:
        text = pattern.sub(latex, text)
    if text.startswith("{") and text.endswith("}") and "," in text:
        text = f"\\{{{text[1:-1]}\\}}"
    return text.strip()


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _ascii(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    compatible = _compatible(character)
    numerator, slash, denominator = compatible.partition("⁄")
    if slash and numerator.isdigit() and denominator.isdigit():
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    if compatible.isascii():
        return compatible
    is_blank = unicodedata.category(character) in ("Zs", "So", "Cc")  # a space, an emoji, a control character
    return _CHARACTERS.get(compatible, " " if is_blank else compatible)


def _without_html(text: str) -> str:
    text = _HTML_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HTML_ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = _HTML_SCRIPT.sub(lambda m: f"{'^' if m[1].lower() == 'sup' else '_'}{{{m[2]}}}", text)
    return _HTML_TAG.sub("", _HTML_BREAK.sub(" ", text)).strip()


def _without_wrappers(text: str) -> str:
    """Remove Markdown emphasis, code marks and quotation marks around the whole text."""
    for wrapper in _MARKDOWN_WRAPPERS:
        size = len(wrapper)
        if len(text) > 2 * size and text.startswith(wrapper) and text.rstrip(".").endswith(wrapper):
            inner = text.rstrip(".")[size:-size]
            if wrapper not in inner:
                text = inner.strip()
    return text


def _with_overline(text: str) -> str:
    r"""Write a repeating decimal as `0.\overline{3}`."""
    if len(text) > _MAX_DECIMAL_CHARS:
        return text
    inner = text.strip(" $")
    if "\\dot" in inner:
        inner = _LATEX_DOTTED.sub(lambda m: f"\\overline{{{m[1]}{m[2] or ''}{m[3] or ''}}}", inner)
    if match := _PERIOD_IN_BRACKETS.fullmatch(inner):
        return f"{match[1]}.{match[2]}\\overline{{{match[3]}}}"
    if match := _WRITTEN_PERIOD.fullmatch(inner):
        return f"{match[1]}\\overline{{{match[2]}}}"
    return inner if "\\overline" in inner else text


def _strip_ends(text: str) -> str:
    while True:
        stripped = text.strip(" $").removesuffix("\\\\")
        stripped = (
            stripped.rstrip(",;:").removesuffix(".") if not stripped.endswith(("\\,", "\\;", "\\:")) else stripped
        )
        if stripped == text:
            return text
        text = stripped


def _without_latex_decoration(text: str) -> str:
    """Remove fonts, colours, sizes and delimiters; use one name where LaTeX has several."""
    if "\\" in text or "{" in text:
        if "\\begin" in text and _ENVIRONMENT.search(text):
            text = _ENVIRONMENT.sub("", text).replace("&", "").strip()
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
        text = _edited(text)
        text = _BARE_BLACKBOARD.sub(r"\\mathbb{\1}", text)
        text = _BARE_BINOMIAL.sub(r"\\binom{\1}{\2}", text)
        text = _DEGREES.sub(r"^{\\circ}", text)
        text = _BARE_FRACTION.sub(_braced_fraction, text)
        text = _BARE_ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text)
    return text


def _braced_fraction(match: re.Match[str]) -> str:
    first, second = match.groups()
    first = first if first.startswith("{") else f"{{{first}}}"
    return f"\\frac{first}{second if second == '{' else f'{{{second}}}'}"


def _edited(text: str) -> str:
    commands: list[tuple[str, int, int]] = []
    closing: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(match.start())
        elif token == "}":
            if open_braces:
                closing[open_braces.pop()] = match.start()
        else:
            commands.append((token[1:].rstrip("*") or token[1:], match.start(), match.end()))
    edits: dict[int, tuple[int, str]] = {}

    def argument(position: int) -> tuple[int, int] | None:
        while text[position : position + 1] == " ":
            position += 1
        return (position, closing[position]) if position in closing else None

    def unwrap(start: int, group: tuple[int, int], before: str = "", after: str = "") -> None:
        edits[start] = (group[0] + 1, before)
        edits[group[1]] = (group[1] + 1, after)

    def unwrap_scope(start: int) -> None:
        # In {\bf 7} the braces only limit the switch; in \frac{\bf 7}{2} and x^{\bf 7} they do not.
        before = text[max(start - 2, 0) : start - 1]
        if start - 1 in closing and before not in ("]", "}", "^", "_") and not before.isalpha():
            unwrap(start - 1, (start - 1, closing[start - 1]))

    if closing.get(0) == len(text) - 1 and ("," not in text.replace("\\,", "") or _GROUPED_IN_BRACES.fullmatch(text)):
        edits[0], edits[len(text) - 1] = (1, ""), (len(text), "")
    for name, start, end in commands:
        group = argument(end)
        if name in _WORD_FONTS and group:
            unwrap(start, group, *_word(text[group[0] + 1 : group[1]][:100], text[max(start - 3, 0) : start]))
        elif name in _FONTS and group:
            word = text[group[0] + 1 : group[1]][:100]
            is_words = re.fullmatch(r"[A-Za-z][A-Za-z .'-]+", word) and name != "underline"
            unwrap(start, group, *(("\\text{", "}") if is_words else ("", "")))
        elif name in _COLOURED and group:
            for _ in range(_COLOURED[name] - 1):
                group = argument(group[1] + 1) or group
            edits[start] = (group[1] + 1, "")
            if content := argument(group[1] + 1):
                unwrap(start, content)
        elif name in _DROPPED_WITH_ARGUMENT and group:
            edits[start] = (group[1] + 1, " ")
            content = argument(group[1] + 1)
            if content and name == "color":
                unwrap(content[0], content)
            elif name == "color":
                unwrap_scope(start)
        elif name in _SWITCHES:
            edits[start] = (end, " ")
            unwrap_scope(start)
        elif name in _DROPPED:
            edits[start] = (end + 1 if name in ("left", "right") and text[end : end + 1] == "." else end, "")
        elif name in _RENAMED:
            new = _RENAMED[name]
            edits[start] = (end, new + " " if new[-1:].isalpha() and text[end : end + 1].isalpha() else new)
    return _apply(text, ((start, *edits[start]) for start in sorted(edits)))


def _word(content: str, before: str) -> tuple[str, str]:
    r"""Return what to write before and after the content of `\mathrm{...}` or `\text{...}`."""
    word = content.strip()
    follows_number = before.rstrip(" ~,;").endswith((*"0123456789}",)) or before.endswith("\\,")
    if word in _FUNCTIONS:
        return "\\", " "
    if len(word) == 1 and word.isalpha():
        is_unit = follows_number and word in _UNIT_LETTERS
        return ("\\text{", "}") if is_unit else (" " if before[-1:].isalpha() else "", "")
    if not any(character.isalpha() for character in _COMMAND.sub("", word)) or _NUMBER_OR_CHOICE.match(word):
        return " ", ""
    return "\\text{", "}"


def _bracketed_arguments(text: str) -> str:
    r"""Write `sqrt(x)`, `exp(x)`, `abs(x)` and `x^(y)` with the braces or delimiters that LaTeX uses."""
    if "(" not in text:
        return text
    closing: dict[int, int] = {}
    open_brackets: list[int] = []
    for position, character in enumerate(text):
        if character == "(":
            open_brackets.append(position)
        elif character == ")" and open_brackets:
            closing[open_brackets.pop()] = position
    edits: list[tuple[int, int, str]] = []
    for match in _PLAIN_FUNCTION.finditer(text):
        start = text.index("(", match.end())
        if start not in closing:
            continue
        before, after = _latex_function(match[0])
        edits.append((match.start(), start + 1, before))
        edits.append((closing[start], closing[start] + 1, after))
    return _apply(text, sorted(edits))


def _latex_function(name: str) -> tuple[str, str]:
    name = re.sub(r"^a(?=sin|cos|tan)", "arc", name)
    special = {
        "sqrt": ("\\sqrt{", "}"), "\\sqrt": ("\\sqrt{", "}"), "cbrt": ("\\sqrt[3]{", "}"), "exp": ("e^{", "}"),
        "abs": ("|", "|"), "floor": ("\\lfloor ", "\\rfloor "), "ceil": ("\\lceil ", "\\rceil "), "^": ("^{", "}"),
    }  # fmt: skip
    return special.get(name, (f"\\{name}(", ")"))


def _apply(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """Replace the spans `(start, end, replacement)`, sorted by start. A span inside an earlier one is ignored."""
    pieces, position = [], 0
    for start, end, replacement in edits:
        if start >= position:
            pieces += [text[position:start], replacement]
            position = end
    return "".join([*pieces, text[position:]])
