"""The lab: train sparse models with SSR and its rivals, evaluate them, attack them, and report (extra: `sinkroute[lab]`)."""
