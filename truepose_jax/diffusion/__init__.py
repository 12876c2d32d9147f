"""The noise schedule, losses, guidance and DDIM: functions of arrays that know no network."""
