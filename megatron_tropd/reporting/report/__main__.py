"""The command ``python -m megatron_tropd.reporting.report RUN_DIR``."""

from megatron_tropd.reporting.report.write import main

main()
