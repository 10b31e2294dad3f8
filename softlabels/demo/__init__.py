"""The main job on real digits, end to end: `softlabels demo`."""
