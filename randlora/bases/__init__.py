"""The random bases that layers share: how they are drawn, stored, cast, packed and recognised again."""
