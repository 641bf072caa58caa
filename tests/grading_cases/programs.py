"""Hand-made cases of --grader code: blocks that are found, outputs that agree, and programs with their tests."""

from __future__ import annotations

BLOCKS = [  # (response, program; None where there is none)
    ("```python\nprint(1)\n```", "print(1)\n"),
    ("Text.\n```python\nprint(1)\n```\nMore text.", "print(1)\n"),
    ("```python\na\n```\n```python\nb\n```", "b\n"),
    ("```py\na\n```", "a\n"),
    ("```python3\na\n```", "a\n"),
    ("```Python\na\n```", "a\n"),
    ("``` python\na\n```", "a\n"),
    ("```python title=x\na\n```", "a\n"),
    ("```\na\n```", "a\n"),
    ("```python\na\n```\nIt prints\n```\n3\n```", "a\n"),
    ("```python\na\n```\n```text\n3\n```", "a\n"),
    ("```\na\n```\n```\nb\n```", "b\n"),
    ("```cpp\nint x;\n```", None),
    ("```bash\npython a.py\n```", None),
    ("```python\na\n```\n```python\nb", "a\n"),
    ("```python\na", None),
    ("print(1)", None),
    ("", None),
    ("`print(1)`", None),
    ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
    ("- so:\n  ```python\n  if x:\n      a\n  ```", "if x:\n    a\n"),
    ("```python\n```", ""),
    ("```python\n\na\n```", "\na\n"),
    ("text ```python\na\n```", None),
    ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
    ("<think>\n```python\na\n```\n</think>\nDone.", None),
    ("<think>\n```python\na\n```", None),
]

OUTPUTS = [  # (found, expected, whether they agree)
    ("3\n", "3", True),
    ("3", "3\n\n", True),
    ("  3  \n 4", "3\n4", True),
    ("3\r\n4\r\n", "3\n4\n", True),
    ("1 2", "1  2", True),
    ("a b", "a  b", False),
    ("3.0", "3", True),
    ("3.50", "3.5", True),
    ("1e3", "1000", True),
    ("0.1", "0.10000000000000001", False),
    ("3", "4", False),
    ("3\n4", "3", False),
    ("3\n\n4", "3\n4", False),
    ("3 4", "3\n4", False),
    ("3 4", "34", False),
    ("3 4 5", "3 4", False),
    ("YES", "Yes", False),
    ("", "", True),
    ("", "3", False),
    ("3", "", False),
    ("nan", "nan", True),
    ("nan", "3", False),
    ("sNaN", "3", False),
    ("inf", "Infinity", True),
    ("9" * 5000, "9" * 5000 + ".0", True),
    ("9" * 5000, "9" * 4999 + "8", False),
    ("1e999999999", "1e999999998", False),
    ("x 1", "x 1.0", False),
]


def stdin(*pairs):
    """Tests by stdin and stdout."""
    return [{"input": given, "output": wanted, "testtype": "stdin"} for given, wanted in pairs]


def call(name, *pairs):
    """Tests of a function: a line of JSON for each argument, and the JSON of the result."""
    return [{"input": given, "output": wanted, "testtype": "functional", "func_name": name} for given, wanted in pairs]


SUM = stdin(("1 2\n", "3\n"), ("-4 4", "0"))
ADD = call("add", ("1\n2", "3"), ("[1]\n[2]", "[1, 2]"))
MAX = call("largest", ("[3, 1]", "3"), ("[]", "null"))

PROGRAMS = [  # (program, tests, whether it passes)
    ("a, b = map(int, input().split())\nprint(a + b)", SUM, True),
    ("print(sum(map(float, input().split())))", SUM, True),
    ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", SUM, True),
    ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", SUM, True),
    ("from __future__ import annotations\nprint(sum(map(int, input().split())))", SUM, True),
    ("print(3)", SUM, False),  # the first test alone
    ("print(sum(map(int, input().split())) or 1)", SUM, False),  # all but the last
    ("print(input())", SUM, False),
    ("", SUM, False),
    ("print(1", SUM, False),
    ("print(sum(map(int, input().split())))\nraise ValueError", SUM, False),
    ("print(sum(map(int, input().split())))\nimport sys; sys.exit(1)", SUM, False),
    ("def add(a, b):\n    return a + b", ADD, True),
    ("class Solution:\n    def add(self, a, b):\n        print('trying', a)\n        return a + b", ADD, True),
    ("class Solution:\n    pass\ndef add(a, b):\n    return a + b", ADD, True),
    ("def add(a, b):\n    return 3", ADD, False),
    ("def plus(a, b):\n    return a + b", ADD, False),
    ("def add(a):\n    return a", ADD, False),
    ("def add(a, b):\n    return {a}", ADD, False),  # no JSON
    ("def add(a, b):\n    print(a + b)", ADD, False),
    ("def largest(a: List[int]) -> Optional[int]:\n    return max(a, default=None)", MAX, True),
    ("def largest(a):\n    return heapq.nlargest(1, a)[0] if a else None", MAX, True),
    ("def largest(a):\n    return str(max(a))", MAX, False),
    ("def pair(a):\n    return a, a", call("pair", ("1", "[1, 1]")), True),
    ("json = os = sys = None\ndef f(a):\n    return a", call("f", ("1", "1")), True),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(a):\n    return A(a).x", call("f", ("1", "1")), True),
    # Programs that try to pass without the answer.
    ("print(3)\nimport os; os._exit(0)", SUM, False),
    ("import os\nos.write(1, b'3')\nos._exit(0)\ndef add(a, b): pass", ADD, False),
    ("import builtins\nbuiltins.print = lambda *a, **k: None\ndef add(a, b): return 0", ADD, False),
    ("import json\njson.dumps = lambda *a, **k: '3'\ndef add(a, b): return 0", ADD, False),
    ("class Same:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Same()", ADD, False),
    ("class Same(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Same(9)", ADD, False),
    ("class Same(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\nprint(Same('9'))", SUM, False),
    ("import sys\nprint([f.f_globals for f in sys._current_frames().values()])", SUM, False),
    ("import inspect\nprint(inspect.stack())", SUM, False),
    ("import sys\nsys.exit(0)", SUM, False),
    ("raise SystemExit", ADD, False),
    ("print('\ud800')", SUM, False),
    ("print('\0')", SUM, False),
    ("print('x' * 10**9)", SUM, False),
    ("def f(n): return f(n + 1)\nf(0)", SUM, False),
    ("print('[' * 10**6)\ndef add(a, b): return 0", ADD, False),
    ("import os\nos.write(1, b'[' * 10**6)\ndef add(a, b): os._exit(0)", ADD, False),
    ("open('/etc/hostname', 'w')", SUM, False),
    ("import socket\nsocket.create_connection(('127.0.0.1', 9))", SUM, False),
]  # fmt: skip

BAD = [  # (reference, what is wrong with it)
    ("no JSON", "a list of tests is not JSON"),
    ("[]", "tests are not a list with an entry"),
    ('{"input": "1", "output": "1", "testtype": "stdin"}', "tests are not a list with an entry"),
    ("[3]", "a test is '3'"),
    ('[{"input": "1", "testtype": "stdin"}]', "expected texts input, output and testtype"),
    ('[{"input": 1, "output": "1", "testtype": "stdin"}]', "expected texts input, output and testtype"),
    ('[{"input": "1", "output": "1"}]', "expected texts input, output and testtype"),
    ('[{"input": "1", "output": "1", "testtype": "call"}]', "a testtype is 'call'; expected stdin or functional"),
    ('[{"input": "1", "output": "1", "testtype": "functional"}]', "has the func_name None"),
    ('[{"input": "1", "output": "1", "testtype": "functional", "func_name": "a b"}]', "has the func_name 'a b'"),
    ('[{"input": "x", "output": "1", "testtype": "functional", "func_name": "f"}]', "the input of a functional test is 'x'"),
    ('[{"input": "1", "output": "", "testtype": "functional", "func_name": "f"}]', "the output of a functional test is ''"),
    ("[" * 100_000, "a list of tests is not JSON"),
]  # fmt: skip
