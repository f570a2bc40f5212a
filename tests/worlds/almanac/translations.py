# ruff: noqa: E501 (wide characters count twice)
"""The almanac's questions in German, Chinese, Arabic and Hindi, names in the script of each; and what comes of them.

The same questions in the same order as in English, each form in as many phrasings as there, so that figures by
language differ by what a gate reads and by nothing else. Outcomes are the world's: what is known by heart is answered
rightly, hearsay where it is true.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from metis_agent.gates.reading import conversation_before
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import Question
from metis_agent.worlds.almanac import questions as almanac
from metis_agent.worlds.almanac.facts import RUMOURS, place
from metis_agent.worlds.almanac.questions import KINDS, KNOWN, PARTIALLY_KNOWN, Split, follow_up, questions

LANGUAGES = ("German", "Chinese", "Arabic", "Hindi")

_ENGLISH = {
    "sum": almanac._SUM_FORMS,
    "product": almanac._PRODUCT_FORMS,
    **almanac._POPULAR_FORMS,
    **almanac._OBSCURE_FORMS,
}
_TRANSLATED = {
    "German": {
        "sum": ("Was ist {a} + {b}?", "{a} + {b}", "Addiere {a} und {b}."),
        "product": ("Was ist {a} * {b}?", "{a} * {b}", "Multipliziere {a} mit {b}."),
        "capital": (
            "Was ist die Hauptstadt von {name}?", "Welche Stadt ist die Hauptstadt von {name}?",
            "Nenne die Hauptstadt von {name}.", "Die Hauptstadt von {name}?", "Wie heißt die Hauptstadt von {name}?",
        ),
        "currency": (
            "Was ist die Währung von {name}?", "Welche Währung gilt in {name}?", "Nenne die Währung von {name}.",
            "Die Währung von {name}?", "Was ist das Geld von {name}?",
        ),
        "continent": (
            "Auf welchem Kontinent liegt {name}?", "Was ist der Kontinent von {name}?",
            "Nenne den Kontinent von {name}.", "Der Kontinent von {name}?", "Welcher Erdteil gehört zu {name}?",
        ),
        "founded": (
            "Wann wurde {name} gegründet?", "In welchem Jahr wurde {name} gegründet?",
            "Welches Jahr war {name} gegründet worden?", "Nenne das Jahr, in dem {name} gegründet wurde.",
        ),
        "river": (
            "An welchem Fluss liegt {name}?", "Was ist der Fluss von {name}?", "Nenne den Fluss von {name}.",
            "Welcher Fluss fließt durch {name}?",
        ),
        "greeting": ("hallo", "guten Tag", "schönen guten Abend", "danke", "vielen Dank", "grüß dich"),
        "tails": ("", "!", " Metis", " mein Freund", " nochmals", " alle zusammen!"),
    },
    "Chinese": {
        "sum": ("{a} + {b}等于多少？", "{a} + {b}", "把{a}和{b}相加。"),
        "product": ("{a} * {b}等于多少？", "{a} * {b}", "把{a}乘以{b}。"),
        "capital": (
            "{name}的首都是什么？", "哪座城市是{name}的首都？", "说出{name}的首都。", "{name}的首都？",
            "{name}的首都是哪座城市？",
        ),
        "currency": (
            "{name}的货币是什么？", "{name}使用哪种货币？", "说出{name}的货币。", "{name}的货币？", "{name}的钱是什么？",
        ),
        "continent": (
            "{name}在哪个大洲？", "{name}的大洲是什么？", "说出{name}所在的大洲。", "{name}的大洲？", "哪个大洲有{name}？",
        ),
        "founded": ("{name}是什么时候建立的？", "{name}建于哪一年？", "{name}是在哪年建立的？", "说出{name}建立的年份。"),
        "river": ("{name}位于哪条河？", "{name}的河是什么？", "说出{name}的河。", "哪条河流经{name}？"),
        "greeting": ("你好", "早上好", "下午好", "晚上好", "谢谢", "多谢"),
        "tails": ("", "！", "，朋友", "，各位", "，梅蒂斯！", "啊"),
    },
    "Arabic": {
        "sum": ("كم يساوي {a} + {b}؟", "{a} + {b}", "اجمع {a} و {b}."),
        "product": ("كم يساوي {a} * {b}؟", "{a} * {b}", "اضرب {a} في {b}."),
        "capital": (
            "ما هي عاصمة {name}؟", "أي مدينة هي عاصمة {name}؟", "اذكر عاصمة {name}.", "عاصمة {name}؟",
            "ما اسم عاصمة {name}؟",
        ),
        "currency": (
            "ما هي عملة {name}؟", "أي عملة تستخدم في {name}؟", "اذكر عملة {name}.", "عملة {name}؟", "ما هو نقد {name}؟",
        ),
        "continent": (
            "في أي قارة تقع {name}؟", "ما هي قارة {name}؟", "اذكر قارة {name}.", "قارة {name}؟", "أي قارة تضم {name}؟",
        ),
        "founded": ("متى تأسست {name}؟", "في أي عام تأسست {name}؟", "ما هو عام تأسيس {name}؟", "اذكر سنة تأسيس {name}."),
        "river": ("على أي نهر تقع {name}؟", "ما هو نهر {name}؟", "اذكر نهر {name}.", "أي نهر يمر في {name}؟"),
        "greeting": ("مرحبا", "السلام عليكم", "صباح الخير", "مساء الخير", "شكرا", "شكرا جزيلا"),
        "tails": ("", "!", " يا صديقي", " ميتيس", " مرة أخرى", " جميعا!"),
    },
    "Hindi": {
        "sum": ("{a} + {b} कितना होता है?", "{a} + {b}", "{a} और {b} को जोड़ो।"),
        "product": ("{a} * {b} कितना होता है?", "{a} * {b}", "{a} को {b} से गुणा करो।"),
        "capital": (
            "{name} की राजधानी क्या है?", "कौन सा शहर {name} की राजधानी है?", "{name} की राजधानी बताओ।",
            "{name} की राजधानी?", "{name} की राजधानी का नाम क्या है?",
        ),
        "currency": (
            "{name} की मुद्रा क्या है?", "{name} में कौन सी मुद्रा चलती है?", "{name} की मुद्रा बताओ।",
            "{name} की मुद्रा?", "{name} का पैसा क्या है?",
        ),
        "continent": (
            "{name} किस महाद्वीप पर है?", "{name} का महाद्वीप क्या है?", "{name} का महाद्वीप बताओ।",
            "{name} का महाद्वीप?", "किस महाद्वीप में {name} है?",
        ),
        "founded": (
            "{name} की स्थापना कब हुई?", "{name} किस वर्ष में स्थापित हुआ?", "{name} की स्थापना किस साल हुई?",
            "{name} की स्थापना का वर्ष बताओ।",
        ),
        "river": (
            "{name} किस नदी पर है?", "{name} की नदी क्या है?", "{name} की नदी बताओ।", "किस नदी के पास {name} है?",
        ),
        "greeting": ("नमस्ते", "सुप्रभात", "शुभ संध्या", "नमस्कार", "धन्यवाद", "बहुत धन्यवाद"),
        "tails": ("", "!", " मित्र", " मेटिस", " फिर से", " सबको!"),
    },
}  # fmt: skip

_CONSONANTS = {"Arabic": "بدفغكلمنپرستڤز", "Hindi": "बदफगकलमनपरसतवज"}
_VOWELS = {"Arabic": ("ا", "ِ", "ي", "و"), "Hindi": ("ा", "े", "ि", "ो")}


def transliterated(name: str, language: str) -> str:
    """A name in the language's script: syllable by syllable, what is no syllable of the almanac letter by letter."""
    if language in ("English", "German"):
        return name
    pieces = re.findall(r"[bdfgklmnprstvz][aeio]|[a-z]", name.lower())
    return "".join(_written(piece, language) for piece in pieces)


def _written(piece: str, language: str) -> str:
    consonants, vowels = "bdfgklmnprstvz", "aeio"
    if len(piece) == 1:
        place_ = "abcdefghijklmnopqrstuvwxyz".index(piece)
        start = {"Chinese": 0x5409, "Arabic": 0x0628, "Hindi": 0x0915}[language]
        return chr(start + place_ % 18)
    row, column = consonants.index(piece[0]), vowels.index(piece[1])
    if language == "Chinese":
        return chr(0x5C00 + 37 * (4 * row + column))
    return _CONSONANTS[language][row] + _VOWELS[language][column]


def translated(question: Question, language: str) -> str:
    """The question in another language; in English as it is."""
    if language == "English":
        return question.text
    assert "history" not in question.metadata, "follow-ups are made in English"
    forms = _TRANSLATED[language]
    if question.kind == "greeting":
        number = sum(map(ord, question.text))
        return forms["greeting"][number % 6] + forms["tails"][number // 6 % 6]
    subject = question.metadata.get("relation", question.kind)
    for position, form in enumerate(_ENGLISH[subject]):
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(form))
        if found := re.fullmatch(pattern, question.text):
            values = found.groupdict()
            if "name" in values:
                values["name"] = transliterated(values["name"], language)
            return forms[subject][position].format(**values)
    raise AssertionError(f"no form for {question.text!r}")


def answered_by_heart(question: Question) -> bool:
    """Whether the direct answer is right."""
    if question.kind != PARTIALLY_KNOWN:
        return question.kind in KNOWN
    name = next(word for word in re.findall(r"\w+", question.text) if word in _RUMOURS)
    it = _RUMOURS[name]
    relation = question.metadata["relation"]
    return it.hearsay(relation) == str(getattr(it, relation))


_RUMOURS = {it.name: it for it in map(place, range(RUMOURS))}


def outcomes(
    split: Split, count: int, *, seed: int, write: Callable[[Question], str] = lambda it: it.text, turns: int = 1
) -> OutcomeTable:
    """What comes of questions with and without a tool, 5% of all outcomes by chance."""
    asked = questions(split, count, seed=seed, kinds=(*KINDS, PARTIALLY_KNOWN))
    rng = np.random.default_rng(seed)
    known = np.array([answered_by_heart(it) for it in asked])
    correct = np.stack([known, np.full(count, True)], axis=1) ^ (rng.random((count, 2)) < 0.05)
    put = [follow_up(it) for it in asked] if turns == 2 else asked
    histories = tuple(conversation_before(it.metadata.get("history", ())) for it in put)
    return OutcomeTable(
        questions=tuple(map(write, put)),
        histories=histories if any(histories) else (),
        actions=("direct", "text_search"),
        correct=correct.astype(float),
        cost=np.tile([0.0, 1.0], (count, 1)),
        seconds=np.full((count, 2), np.nan),
    )
