"""What runs in evalscope's environment: evalscope asks the servers, keeps their answers, and hands them to our grading.

* ``launch.py``  the program: its job comes by standard input, its progress goes to standard output
* ``evaluate.py``  one benchmark by evalscope, and its scores
* ``adapters.py``  our questions and our grading as benchmarks of evalscope
* ``grading.py``  what a response to each kind of question gets
* ``servers.py``  several servers as one model of evalscope
"""
