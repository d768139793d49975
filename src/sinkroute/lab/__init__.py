"""The lab: train sparse models with SSR and its rivals, evaluate, attack, report (extra: `sinkroute[lab]`)."""
