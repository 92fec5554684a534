"""Search at inference time: functions of one shape over propose, score and a budget."""
