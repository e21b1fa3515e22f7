# Importing mergekit's registry brings the hook, which imports `methods`: before `methods` itself is under way, that is.
import mergekit.merge_methods.registry  # noqa: F401
