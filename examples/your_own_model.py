"""Questions and a tool on which a small pretrained model can learn when not to call (docs/how-to/your-own-model.md).

    python examples/your_own_model.py questions.jsonl        (a number after it: so many of the 428)
    metis demo --model FOLDER --questions questions.jsonl --tools examples/your_own_model.py:calculator

Three kinds: sums of one digit, which such a model mostly knows; products of two digits, which it does not; and
capitals, of which it knows many, and for which the calculator is of no use.
"""

import ast
import json
import operator
import random
import sys
from collections.abc import Callable
from pathlib import Path

CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Armenia Yerevan, Australia Canberra, Austria Vienna,
Azerbaijan Baku, Bahrain Manama, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bolivia Sucre, Brazil Brasília,
Bulgaria Sofia, Cambodia Phnom_Penh, Cameroon Yaoundé, Canada Ottawa, Chad N'Djamena, Chile Santiago, China Beijing,
Colombia Bogotá, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark Copenhagen, Ecuador Quito, Egypt Cairo,
Estonia Tallinn, Ethiopia Addis_Ababa, Fiji Suva, Finland Helsinki, France Paris, Georgia Tbilisi, Germany Berlin,
Ghana Accra, Greece Athens, Guatemala Guatemala_City, Haiti Port-au-Prince, Honduras Tegucigalpa, Hungary Budapest,
Iceland Reykjavik, India New_Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Israel Jerusalem,
Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman, Kenya Nairobi, Kuwait Kuwait_City, Laos Vientiane, Latvia Riga,
Lebanon Beirut, Liberia Monrovia, Libya Tripoli, Lithuania Vilnius, Madagascar Antananarivo, Malaysia Kuala_Lumpur,
Mali Bamako, Malta Valletta, Mexico Mexico_City, Moldova Chișinău, Mongolia Ulaanbaatar, Morocco Rabat,
Mozambique Maputo, Nepal Kathmandu, Nicaragua Managua, Nigeria Abuja, Norway Oslo, Oman Muscat, Pakistan Islamabad,
Panama Panama_City, Paraguay Asunción, Peru Lima, Philippines Manila, Poland Warsaw, Portugal Lisbon, Qatar Doha,
Romania Bucharest, Russia Moscow, Rwanda Kigali, Senegal Dakar, Serbia Belgrade, Singapore Singapore,
Slovakia Bratislava,
Slovenia Ljubljana, Somalia Mogadishu, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Syria Damascus, Thailand Bangkok,
Tunisia Tunis, Turkey Ankara, Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Uzbekistan Tashkent, Venezuela Caracas,
Vietnam Hanoi, Yemen Sanaa, Zambia Lusaka, Zimbabwe Harare
"""

_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip


def calculator(expression: str) -> str:
    """Works out an expression such as 34 * 8."""
    try:
        if len(expression) > 100:
            raise ValueError("it is too long")
        return str(_value(ast.parse(expression, mode="eval").body))
    except (ValueError, SyntaxError, ArithmeticError) as error:
        return f"Error: {error}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError("only numbers and + - * / are known")


def questions(seed: int = 0) -> list[dict[str, str]]:
    """Rows of a file of questions: 81 sums, 240 products and a hundred capitals, in random order."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    products = rng.sample([(a, b) for a in range(12, 100) for b in range(12, 100)], 240)
    capitals = [pair.split() for pair in CAPITALS.replace("\n", " ").split(",")]
    rows = [
        *(("small sum", f"What is {a} + {b}?", str(a + b)) for a, b in sums),
        *(("product", f"What is {a} * {b}?", str(a * b)) for a, b in products),
        *(("capital", f"What is the capital of {land}?", city.replace("_", " ")) for land, city in capitals),
    ]
    rng.shuffle(rows)
    return [{"question": text, "answer": answer, "kind": kind} for kind, text, answer in rows]


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) for row in questions()]
    lines = lines[: int(sys.argv[2])] if len(sys.argv) > 2 else lines
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} questions in {sys.argv[1]}")
