"""What runs inside the process that is confined: ``launcher.py``, alone, because its folder is on an import path."""
