"""Hand-made cases of --grader math: (response, reference, whether it is right).  All responses ended with a stop token."""

from __future__ import annotations

CASES = [
    # Fractions and decimals.
    (r"The probability is \boxed{\frac{1}{2}}.", "0.5", True),
    (r"\boxed{\frac12}", "1/2", True),
    (r"\boxed{\dfrac{3}{4}}", "0.75", True),
    (r"\boxed{\tfrac{3}{4}}", r"\frac{3}{4}", True),
    (r"\boxed{6/8}", r"\frac{3}{4}", True),
    (r"\boxed{-\frac{1}{3}}", r"\frac{-1}{3}", True),
    (r"\boxed{0.333333}", "1/3", True),  # six digits are enough for math-verify
    (r"\boxed{0.33}", "1/3", False),
    (r"\boxed{1\frac{1}{2}}", "3/2", True),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}", False),
    (r"\boxed{\frac{1}{2}}", r"-\frac{1}{2}", False),
    # Whole numbers, signs, zeros.
    (r"\boxed{204}", "204", True),
    (r"\boxed{204.0}", "204", True),
    (r"\boxed{007}", "7", True),
    (r"\boxed{+7}", "7", True),
    (r"\boxed{-3}", "3", False),
    (r"\boxed{8}", "7", False),
    (r"\boxed{12}", "1 2", False),
    (r"\boxed{73}", "073", True),  # AIME answers have leading zeros
    # Thousands separators.
    (r"\boxed{1,024}", "1024", True),
    (r"\boxed{1024}", "1,024", True),
    (r"\boxed{1{,}024}", "1024", True),
    (r"\boxed{1\,024}", "1024", True),
    (r"\boxed{12,345,678}", "12345678", True),
    (r"\boxed{1,02}", "102", False),
    (r"\boxed{1,024}", "1025", False),
    # Powers, roots, expressions, equations.
    (r"\boxed{10^3}", "1000", True),
    (r"\boxed{\sqrt{2}}", "2^{1/2}", True),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
    (r"\boxed{x=3}", "3", True),
    (r"\boxed{x+1}", "x+2", False),
    (r"\boxed{\frac{\pi}{2}}", r"\pi/2", True),
    (r"\boxed{\sqrt{2}}", r"\sqrt{3}", False),
    (r"\boxed{\log_2 8}", "3", True),
    # Sets, tuples, intervals.
    (r"\boxed{\{1,2\}}", r"\{2,1\}", True),
    (r"\boxed{(1,2)}", "(1, 2)", True),
    (r"\boxed{(2,1)}", "(1,2)", False),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\pi/2)", True),
    (r"\boxed{[0,1)}", "[0,1)", True),
    (r"\boxed{(0,1)}", "[0,1]", False),
    # Units, money, percent.
    (r"\boxed{7\text{ cm}}", "7", True),
    (r"\boxed{7\ \mathrm{cm}}", "7", True),
    (r"\boxed{\$7}", "7", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{50\%}", "50", True),
    (r"\boxed{8\text{ cm}}", "7", False),
    # Text.
    (r"\boxed{\text{Paris}}", "Paris", True),
    (r"\boxed{paris}", r"\text{Paris}", True),
    (r"\boxed{\mathrm{ New  York }}", "New York", True),
    (r"\boxed{London}", "Paris", False),
    (r"\boxed{east}", "eats", False),
    (r"\boxed{silent}", r"\text{listen}", False),
    (r"\boxed{\text{even}}", r"\text{odd}", False),
    (r"\boxed{B}", "A", False),
    (r"\boxed{5:00}", "5:00", True),
    (r"\boxed{6:00}", "5:00", False),
    # Several numbers are a text.
    (r"\boxed{1 2}", "1  2", True),
    (r"\boxed{1 2}", "2 1", False),
    (r"\boxed{1 2}", "3", False),
    # Which answer counts.
    (r"First \boxed{6}, no: \boxed{7}.", "7", True),
    (r"It is \boxed{7}. Check: \boxed{6}.", "7", False),
    (r"\boxed{x = \boxed{7}}", "7", True),
    (r"\boxed{7} and then \boxed{8", "7", True),  # a box that does not close is none
    (r"\boxed{7 or 8}", "7", False),
    ("The answer is 7.", "7", False),
    ("", "7", False),
    (r"\boxed{}", "7", False),
    (r"\boxed{ }", "7", False),
    (r"\fbox{7}", "7", False),
    ("$$\\boxed{\n7\n}$$", "7", True),
    (r"\boxed{7.}", "7", True),
    (r"\boxed{$7$}", "7", True),
    # Thoughts.
    (r"<think>Maybe \boxed{6}.</think> So \boxed{7}.", "7", True),
    (r"<think>Clearly \boxed{7}.</think> So it is 7.", "7", False),
    (r"Maybe \boxed{6}.</think> So \boxed{7}.", "7", True),  # the template opened the thought
    (r"<think>Clearly \boxed{7}.", "7", False),
    (r"<think>a</think> \boxed{6} <think>b</think> \boxed{7}", "7", True),
    (r"<think>a</think> \boxed{7} <think>b</think> done", "7", False),
    # Answers that are meant to pass or to do harm.
    (r"\boxed{not 7 but 8}", "7", False),
    (r"\boxed{1/0}", "2/0", False),
    (r"\boxed{9^{9^{9^9}}}", "7", False),
    (r"\boxed{" + "9" * 1200 + "}", "7", False),
    (r"\boxed{7\}", "7", False),
    (r"\boxed{7}\boxed{" * 500, "8", False),
    ("\\boxed{\u0667}", "8", False),
    ("\\boxed{\ud800}", "7", False),
    (r"\boxed{\text{the reference answer}}", "7", False),
    (r"\boxed{x}", "7", False),
]
