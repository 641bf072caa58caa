"""Hand-made cases of --grader instructions: (constraints, response, strict verdict, loose verdict)."""

from __future__ import annotations


def one(name, **kwargs):
    """One constraint in the form of the data."""
    return {"instruction_id": name, "kwargs": kwargs}


COMMA = one("punctuation:no_comma")
TITLE = one("detectable_format:title")
QUOTED = one("startend:quotation")
JSON = one("detectable_format:json_format")
TWO = one("combination:two_responses")
CHOSEN = one("detectable_format:constrained_response")
KEYWORDS = one("keywords:existence", keywords=["fox", "New York"])
FORBIDDEN = one("keywords:forbidden_words", forbidden_words=["cat", "a.b"])
WORD_5 = one("length_constraints:number_words", num_words=5, relation="at least")
FEW_WORDS = one("length_constraints:number_words", num_words=5, relation="less than")
SENTENCES = one("length_constraints:number_sentences", num_sentences=3, relation="at least")
FEW_SENTENCES = one("length_constraints:number_sentences", num_sentences=3, relation="less than")
PARAGRAPHS = one("length_constraints:number_paragraphs", num_paragraphs=2)
SECOND = one("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=2, first_word="Well")
BULLETS = one("detectable_format:number_bullet_lists", num_bullets=2)
HIGHLIGHTS = one("detectable_format:number_highlighted_sections", num_highlights=2)
SECTIONS = one("detectable_format:multiple_sections", section_spliter="Section", num_sections=2)
PLACEHOLDERS = one("detectable_content:number_placeholders", num_placeholders=2)
POSTSCRIPT = one("detectable_content:postscript", postscript_marker="P.S.")
PPS = one("detectable_content:postscript", postscript_marker="P.P.S")
END = one("startend:end_checker", end_phrase="That is all.")
REPEAT = one("combination:repeat_prompt", prompt_to_repeat="Name a fox.")
OFTEN = one("keywords:frequency", keyword="fox", frequency=2, relation="at least")
SELDOM = one("keywords:frequency", keyword="fox", frequency=2, relation="less than")
LETTER = one("keywords:letter_frequency", letter="e", let_frequency=3, let_relation="at least")
CAPITALS = one("change_case:capital_word_frequency", capital_frequency=2, capital_relation="at least")
FEW_CAPITALS = one("change_case:capital_word_frequency", capital_frequency=2, capital_relation="less than")

CASES = [
    ([COMMA], "No such sign here.", True, True),
    ([COMMA], "Here, there is one.", False, False),
    ([COMMA], "Sure, here it is:\nNo such sign.", False, True),
    ([COMMA], "No such sign.\nI hope, this helps.", False, True),
    ([COMMA], "Sure, here:\nNo such sign.\nI hope, this helps.", False, True),
    ([COMMA], "a\nb, c\nd", False, False),
    ([COMMA], "", False, False),
    ([COMMA], " \n ", False, False),
    ([TITLE], "<<On foxes>>\nA fox.", True, True),
    ([TITLE], "<< >>\nA fox.", False, False),
    ([TITLE], "<On foxes>", False, False),
    ([TITLE], "<<On\nfoxes>>", False, False),
    ([QUOTED], '"A fox."', True, True),
    ([QUOTED], '"', False, False),
    ([QUOTED], "'A fox.'", False, False),
    ([QUOTED], 'Sure:\n"A fox."', False, True),
    ([JSON], '{"a": [1, 2]}', True, True),
    ([JSON], '```json\n{"a": 1}\n```', True, True),
    ([JSON], "```\n[1]\n```", True, True),
    ([JSON], "{'a': 1}", False, False),
    ([JSON], 'Sure:\n{"a": 1}', False, True),
    ([JSON], "[" * 100_000, False, False),
    ([TWO], "one ****** two", True, True),
    ([TWO], "******\none\n******\ntwo\n******", True, True),
    ([TWO], "one ****** one", False, False),
    ([TWO], "one ****** two ****** three", False, False),
    ([TWO], "one ****** ****** two", False, False),
    ([TWO], "one *** two", False, False),
    ([CHOSEN], "I thought about it. My answer is no.", True, True),
    ([CHOSEN], "My answer is nope", False, False),
    ([CHOSEN], "**My answer is yes.**", True, True),
    ([KEYWORDS], "A FOX in new york.", True, True),
    ([KEYWORDS], "A fox in York.", False, False),
    ([FORBIDDEN], "A catalogue and axb.", True, True),
    ([FORBIDDEN], "A Cat.", False, False),
    ([FORBIDDEN], "It says a.b here.", False, False),
    ([WORD_5], "one two three four five", True, True),
    ([WORD_5], "one two three four", False, False),
    ([FEW_WORDS], "one two three four", True, True),
    ([FEW_WORDS], "one-two three's four", False, False),  # one, two, three, s, four
    ([FEW_WORDS], "Here are the words you want:\none two", False, True),
    ([SENTENCES], "One. Two! Three?", True, True),
    ([SENTENCES], "One. Two", False, False),
    ([SENTENCES], "Dr. Smith met J. Doe, e.g. at 3.5 p.m. today.", False, False),
    ([SENTENCES], "1. First\n2. Second", False, False),
    ([SENTENCES], 'He said "no." She left... Then', True, True),
    ([FEW_SENTENCES], "One sentence with 3.14 in it. And two", True, True),
    ([FEW_SENTENCES], "A. B. C", True, True),  # capital letters alone are initials
    ([PARAGRAPHS], "one\n***\ntwo", True, True),
    ([PARAGRAPHS], "***\none\n***\ntwo\n***", True, True),
    ([PARAGRAPHS], "one\n\ntwo", False, False),
    ([PARAGRAPHS], "one\n***\n***\ntwo", False, False),
    ([SECOND], "First.\n\nWell, second.", True, True),
    ([SECOND], 'First.\n\n"well" second.', True, True),
    ([SECOND], "First.\n\nWells.", False, False),
    ([SECOND], "First.\n\nWell.\n\nThird.", False, True),  # without its last line
    ([SECOND], "Well.", False, False),
    ([BULLETS], "* one\n* two", True, True),
    ([BULLETS], "- one\n  - two", True, True),
    ([BULLETS], "* one\n* two\n* three", False, True),  # without its first or last line
    ([BULLETS], "**one**\n**two**", False, False),
    ([BULLETS], "1. one\n2. two", False, False),
    ([HIGHLIGHTS], "*one* and **two**", True, True),
    ([HIGHLIGHTS], "*one* and * *", False, False),
    ([HIGHLIGHTS], "*one and\ntwo*", False, False),
    ([SECTIONS], "Section 1\na\nSection 2\nb", True, True),
    ([SECTIONS], "Section one\nSection two", False, False),
    ([SECTIONS], "SECTION 1 SECTION 2", False, False),
    ([PLACEHOLDERS], "Dear [name], come to [place].", True, True),
    ([PLACEHOLDERS], "Dear [name].", False, False),
    ([POSTSCRIPT], "Bye.\nP.S. Write soon.", True, True),
    ([POSTSCRIPT], "Bye.\np. s. Write soon.", True, True),
    ([POSTSCRIPT], "Bye. PS: write soon.", False, False),
    ([PPS], "P.S. a\nP.P.S b", True, True),
    ([PPS], "P.S. a", False, False),
    ([END], "A fox. That is all.", True, True),
    ([END], '"A fox. THAT IS ALL."', True, True),
    ([END], "That is all. Bye.", False, False),
    ([END], "**That is all.**", False, True),
    ([REPEAT], "name a fox. Reineke.", True, True),
    ([REPEAT], "Reineke. Name a fox.", False, False),
    ([REPEAT], "Sure:\nName a fox. Reineke.", False, True),
    ([OFTEN], "Fox and foxes", True, True),
    ([OFTEN], "fox", False, False),
    ([SELDOM], "fox", True, True),
    ([SELDOM], "fox fox", False, False),
    ([LETTER], "Eeyore", True, True),
    ([LETTER], "ear", False, False),
    ([CAPITALS], "NASA and ESA launch", True, True),
    ([CAPITALS], "Nasa and Esa", False, False),
    ([FEW_CAPITALS], "NASA launches", True, True),
    ([FEW_CAPITALS], "I AM here", False, False),
    # Several constraints at one time; what the response says after its thoughts.
    ([COMMA, TITLE], "<<A>>\nno such sign", True, True),
    ([COMMA, TITLE], "<<A>>\none, here", False, True),  # each constraint has a variant of its own
    ([COMMA, TITLE], "no title", False, False),
    ([COMMA], "<think>Well, let me see, ...</think>No such sign.", True, True),
    ([COMMA], "<think>No such sign.</think>Here, one.", False, False),
    ([COMMA], "<think>No such sign.", False, False),
    ([QUOTED], '<think>x</think>\n\n"A fox."', True, True),
]

LANGUAGE = [
    ([one("language:response_language", language="de")], "Der Fuchs lebt im Wald und jagt in der Nacht.", True, True),
    ([one("language:response_language", language="de")], "The fox lives in the forest and hunts at night.", False, False),
    ([one("language:response_language", language="en")], "12 + 30 = 42", True, True),  # nothing to tell it by
    ([one("change_case:english_capital")], "THE FOX LIVES IN THE FOREST AND HUNTS AT NIGHT.", True, True),
    ([one("change_case:english_capital")], "The fox lives in the forest.", False, False),
    ([one("change_case:english_lowercase")], "the fox lives in the forest and hunts at night.", True, True),
    ([one("change_case:english_lowercase")], "The fox lives in the forest.", False, False),
    ([one("change_case:english_lowercase")], "der fuchs lebt im wald und jagt in der nacht.", False, False),
]  # fmt: skip

BAD = [
    ("no JSON", "a list of constraints is not JSON: 'no JSON'"),
    ("{}", "constraints are not a list with an entry"),
    ("[]", "constraints are not a list with an entry"),
    ('["punctuation:no_comma"]', "a constraint is"),
    ('[{"instruction_id": "punctuation:no_comma", "kwargs": []}, {"instruction_id": "x:y"}]', "'x:y'; expected one of IFEval's 25"),
    ('[{"instruction_id": "punctuation:no_comma", "kwargs": 7}]', "a constraint is"),
    ('[{"instruction_id": "count:pronouns", "kwargs": {"N": 3}}]', "'count:pronouns'; expected one of IFEval's 25: change_case"),
    ('[{"kwargs": {}}]', "an instruction_id is 'None'"),
    ('[{"instruction_id": "punctuation:no_comma", "kwargs": {"n": 1}}]', "has the kwargs 'n'; expected none"),
    ('[{"instruction_id": "startend:end_checker", "kwargs": {}}]', "has the kwargs none; expected end_phrase"),
    ('[{"instruction_id": "startend:end_checker", "kwargs": {"end_phrase": null}}]', "has the kwargs none; expected end_phrase"),
    ('[{"instruction_id": "startend:end_checker", "kwargs": {"end_phrase": " "}}]', "expected a text that is not blank"),
    ('[{"instruction_id": "keywords:existence", "kwargs": {"keywords": "fox"}}]', "expected a list of texts that are not blank"),
    ('[{"instruction_id": "keywords:existence", "kwargs": {"keywords": ["fox", ""]}}]', "expected a list of texts that are not blank"),
    ('[{"instruction_id": "detectable_format:number_bullet_lists", "kwargs": {"num_bullets": -1}}]', "expected a whole number that is not negative"),
    ('[{"instruction_id": "detectable_format:number_bullet_lists", "kwargs": {"num_bullets": 2.5}}]', "expected a whole number that is not negative"),
    ('[{"instruction_id": "detectable_format:number_bullet_lists", "kwargs": {"num_bullets": true}}]', "expected a whole number that is not negative"),
    ('[{"instruction_id": "detectable_format:number_bullet_lists", "kwargs": {"num_bullets": Infinity}}]', "expected a whole number that is not negative"),
    ('[{"instruction_id": "length_constraints:number_words", "kwargs": {"num_words": 3, "relation": "at most"}}]', "expected less than or at least"),
]  # fmt: skip
