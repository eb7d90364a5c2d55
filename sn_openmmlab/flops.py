"""FLOPs of SN in mmengine's complexity analysis, which counts norm layers by the operators that torch has for them."""

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter


def register() -> None:
    """Count a traced ``var_mean``, which SN takes its moments by, as mmengine counts the other norms: 5 an element."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault('aten::var_mean', elementwise_flop_counter(5))
