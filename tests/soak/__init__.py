"""The whole gateway for minutes: does anything grow, does it survive what dies around it?"""
