"""What the ledger does in Redis: its keys, and one Lua script for each thing that is done at once."""

from __future__ import annotations

from gateway.kit.ledger import ROWS_LIMIT

# All keys of the ledger carry one hash tag: a Cluster keeps them on one node, as one call on several keys needs.
PREFIX = "{xenios}:ledger:"
LEASES = PREFIX + "leases"  # sorted set: operation → when its reservations are spent as reserved
# Hash of one operation: budget's key → reserved; `~row`; `~back` if it is to be given back, not spent; `~gone` once it
# was reaped: then budget's key → what was spent.
OPERATION = PREFIX + "op:"
ADJUSTED = PREFIX + "adjusted:"  # operation and budget that were charged without a reservation
ROWS = PREFIX + "rows"  # stream
DROPPED = PREFIX + "dropped"  # how many rows found no place in it
MOVER = PREFIX + "mover"  # the worker that takes rows
WORKERS = PREFIX + "workers"  # sorted set: worker → when what it leased is given back
HEARD = PREFIX + "heard:"  # of one worker: how many of its notes
LEASED = PREFIX + "leased:"  # hash of one worker: `b` or `s` and the rule's key → micro-USD, or places

_TIME = """
local now = tonumber(ARGV[1])
if now == 0 then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local lease = tonumber(ARGV[2])
local function text(n) return string.format('%.0f', n) end
"""

# What a worker admits within leases it only notes (NOTE), on another connection. So that nothing overtakes a note, the
# last of KEYS is how many Redis has heard of, and the last of ARGV how many there must be. Returns -1 and how many, or
# goes on.
_AFTER_NOTES = """
if ARGV[#ARGV] ~= '0' then
  local heard = tonumber(redis.call('GET', KEYS[#KEYS]) or 0)
  if heard < tonumber(ARGV[#ARGV]) then return {-1, heard} end
end
"""

# KEYS: one per rule, then the operation's and the leases. ARGV: the time in µs (0: Redis's own), the lease in µs, the
# operation, its row, '1' if it is to be given back, the worker, then five per rule:
#   'r', the bucket's size in µs, what the request takes in µs, '';
#   's', the number of slots, operations that are over but whose slots may not have been freed yet, '';
#   'b', the limit, the least and the most to reserve as 'least most', when the count may be forgotten in ms or '';
#   and '', or what the worker gives back of what it leased (a rate's end in µs; a number of places that stay in use) if
#   it wants to lease anew.
# Returns 1 or 0, then each rule's level before, as text, each rule's lease likewise, and the time.
JUDGE = (
    _TIME
    + _AFTER_NOTES
    + f"""
local op, n, mine = ARGV[3], #KEYS - 3, '{LEASED}' .. ARGV[6]
local out, ok, grant, budgets, wishes = {{1}}, true, nil, false, false
local function own(kind, key) return tonumber(redis.call('HGET', mine, kind .. key) or 0) end
for i = 1, n do
  local key, p = KEYS[i], 5 * i + 2
  local kind, room, level, wish = ARGV[p], tonumber(ARGV[p + 1]), nil, tonumber(ARGV[p + 4])
  wishes = wishes or wish
  if kind == 's' then
    for over in string.gmatch(ARGV[p + 2], '%S+') do redis.call('ZREM', key, over) end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    level = redis.call('ZCARD', key) + tonumber(redis.call('GET', key .. ':leased') or 0)
    if wish then level = level - own('s', key) + wish end
    if level >= room then ok = false end
  elseif kind == 'b' then
    local held = redis.call('HMGET', key, 'spent', 'reserved', 'leased')
    local spent, reserved = tonumber(held[1] or 0), tonumber(held[2] or 0) + tonumber(held[3] or 0)
    if wish then reserved = reserved - own('b', key) end
    local least, most = string.match(ARGV[p + 2], '(%d+) (%d+)')
    local left = room - spent - reserved
    if left < tonumber(least) then ok = false end
    if most ~= '0' then grant = math.min(grant or left, left, tonumber(most)) end
    budgets = true
    level = text(spent) .. ' ' .. text(reserved)
  else
    level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    if wish then level = math.max(0, level - math.max(0, wish - now)) end
    if level + tonumber(ARGV[p + 2]) > room + 0.5 then ok = false end
    level = string.format('%.3f', level)
  end
  out[i + 1] = tostring(level)
end
if not ok then out[1] = 0; return out end
local gone = budgets and redis.call('HEXISTS', KEYS[n + 1], '~gone')
local workers = 1
if wishes then
  redis.call('ZADD', '{WORKERS}', now + lease, ARGV[6])
  workers = redis.call('ZCOUNT', '{WORKERS}', now, '+inf')
end
-- of what is left when the request has taken its own: nothing that is not good for two more such requests
local function share(left, room, taken, most)
  local part = math.min(left / (4 * workers), most)
  if left * 10 < room or part < 2 * taken then return 0 end
  return part
end
for i = 1, n do
  local key, p = KEYS[i], 5 * i + 2
  local kind, room, wish = ARGV[p], tonumber(ARGV[p + 1]), tonumber(ARGV[p + 4])
  out[n + 1 + i] = ''
  if kind == 's' then
    redis.call('ZADD', key, now + lease, op)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
    if wish then
      local spare = math.floor(share(room - tonumber(out[i + 1]) - 1, room, 1, room))
      local more = wish + spare - own('s', key)
      if more ~= 0 then redis.call('INCRBY', key .. ':leased', more) end
      redis.call('HSET', mine, 's' .. key, text(wish + spare))
      out[n + 1 + i] = text(spare)
    end
  elseif kind == 'b' then
    -- an operation whose lease ended was charged what it had reserved: what it takes on top is charged too
    local taken = string.sub(ARGV[p + 2], -2) == ' 0' and 0 or grant
    redis.call('HINCRBY', key, gone == 1 and 'spent' or 'reserved', text(taken))
    if ARGV[p + 3] ~= '' then redis.call('PEXPIREAT', key, ARGV[p + 3]) end
    redis.call('HINCRBY', KEYS[n + 1], key, text(taken))
    if wish then
      local spent, reserved = string.match(out[i + 1], '(%S+) (%S+)')
      local part = math.floor(share(room - tonumber(spent) - tonumber(reserved) - taken, room, taken, room))
      redis.call('HINCRBY', key, 'leased', text(part - own('b', key)))
      redis.call('HSET', mine, 'b' .. key, text(part))
      out[n + 1 + i] = text(part)
    end
  else
    local taken = tonumber(ARGV[p + 2])
    local ahead = tonumber(out[i + 1]) + taken
    if wish then
      local part = share(room - ahead, room, taken, lease)
      ahead = ahead + part
      out[n + 1 + i] = string.format('%.3f', now + part)
    end
    redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
  end
end
if budgets then
  if ARGV[4] ~= '' then redis.call('HSET', KEYS[n + 1], '~row', ARGV[4]) end
  if ARGV[5] ~= '' then redis.call('HSET', KEYS[n + 1], '~back', '1') end
  if gone == 0 then redis.call('ZADD', KEYS[n + 2], now + lease, op) end
end
out[2 * n + 2] = text(now)
return out
"""
)

# KEYS: one per rule. ARGV: the time, the lease, the worker, then two per rule: its kind, and what the worker would give
# back of its lease as for JUDGE, or ''. Returns each rule's level, as text.
PEEK = (
    _TIME
    + f"""
local out, mine = {{}}, '{LEASED}' .. ARGV[3]
local function own(kind, key) return tonumber(redis.call('HGET', mine, kind .. key) or 0) end
for i, key in ipairs(KEYS) do
  local kind, kept = ARGV[2 * i + 2], tonumber(ARGV[2 * i + 3])
  if kind == 'slots' then
    local level = redis.call('ZCOUNT', key, '(' .. text(now), '+inf') + (redis.call('GET', key .. ':leased') or 0)
    out[i] = text(level + (kept and kept - own('s', key) or 0))
  elseif kind == 'budget' then
    local held = redis.call('HMGET', key, 'spent', 'reserved', 'leased')
    local reserved = tonumber(held[2] or 0) + tonumber(held[3] or 0) - (kept and own('b', key) or 0)
    out[i] = text(tonumber(held[1] or 0)) .. ' ' .. text(reserved)
  else
    local level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    out[i] = string.format('%.3f', math.max(0, level - math.max(0, (kept or 0) - now)))
  end
end
return out
"""
)

_GIVE_BACK = f"""
local function give_back(worker)
  local fields = redis.call('HGETALL', '{LEASED}' .. worker)
  for i = 1, #fields, 2 do
    local kind, key = string.sub(fields[i], 1, 1), string.sub(fields[i], 2)
    if kind == 'b' then
      redis.call('HINCRBY', key, 'leased', text(0 - fields[i + 1]))
    elseif redis.call('DECRBY', key .. ':leased', fields[i + 1]) <= 0 then
      redis.call('DEL', key .. ':leased')
    end
  end
  redis.call('DEL', '{LEASED}' .. worker)
end
"""

# Whose requests cost nothing need no count: clients may invent as many names as they like.
_FORGET_IF_UNUSED = """
local function forget_if_unused(key)
  for _, micros in ipairs(redis.call('HMGET', key, 'spent', 'reserved', 'leased')) do
    if micros and tonumber(micros) ~= 0 then return end
  end
  redis.call('DEL', key)
end
"""

# KEYS: one per change. ARGV: the time, the lease, then four per change: its kind, operation, value, and more.
#   'r' moves a bucket by µs; 's' frees a slot; 'l' renews a slot's lease; 'k' a reservation's.
#   'b' spends the value of what an operation reserved ('' all). More is not '' if it is to be spent also without a
#   reservation, once: that is remembered for a day. It is when the count may be forgotten in ms, or a word.
#   'w' records the value as a row.
#   'm' gives back a rate's lease that would have melted at the value, 'e' what a worker (the operation) leased of a
#   budget, 'p' what it leased of slots but for the value, 'x' all that it leased but of rates.
SETTLE = (
    _TIME
    + _AFTER_NOTES
    + _GIVE_BACK
    + _FORGET_IF_UNUSED
    + f"""
local leases, operation, adjusted, rows, dropped, leased =
  '{LEASES}', '{OPERATION}', '{ADJUSTED}', '{ROWS}', '{DROPPED}', '{LEASED}'
"""
    + f"""
for i = 1, #KEYS - 1 do
  local key, p = KEYS[i], 4 * i - 1
  local kind, op, value, more = ARGV[p], ARGV[p + 1], ARGV[p + 2], ARGV[p + 3]
  if kind == 'r' then
    local ahead = math.max(0, tonumber(redis.call('GET', key) or 0) - now) + tonumber(value)
    if ahead > 0 then
      redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
    else
      redis.call('DEL', key)
    end
  elseif kind == 's' then
    redis.call('ZREM', key, op)
  elseif kind == 'l' then
    redis.call('ZADD', key, now + lease, op)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
  elseif kind == 'k' then
    redis.call('ZADD', key, 'XX', now + lease, op)
  elseif kind == 'm' then
    local at = tonumber(redis.call('GET', key) or 0) - math.max(0, tonumber(value) - now)
    if at > now then
      redis.call('SET', key, string.format('%.3f', at), 'PX', math.ceil((at - now) / 1000) + 1)
    else
      redis.call('DEL', key)
    end
  elseif kind == 'e' then
    local before = tonumber(redis.call('HGET', leased .. op, 'b' .. key) or 0)
    if before > 0 then
      redis.call('HINCRBY', key, 'leased', text(0 - before))
      forget_if_unused(key)
    end
    redis.call('HDEL', leased .. op, 'b' .. key)
  elseif kind == 'x' then
    give_back(op)
  elseif kind == 'p' then
    local more = tonumber(value) - tonumber(redis.call('HGET', leased .. op, 's' .. key) or 0)
    if redis.call('INCRBY', key .. ':leased', text(more)) <= 0 then redis.call('DEL', key .. ':leased') end
    if value == '0' then
      redis.call('HDEL', leased .. op, 's' .. key)
    else
      redis.call('HSET', leased .. op, 's' .. key, value)
      redis.call('ZADD', '{WORKERS}', now + lease, op)
    end
  elseif kind == 'w' then
    if redis.call('XLEN', rows) >= {ROWS_LIMIT} then
      redis.call('INCR', dropped)
    else
      redis.call('XADD', rows, '*', 'op', op, 'row', value)
    end
  else
    local held = operation .. op
    local amount = redis.call('HGET', held, key)
    if amount then
      local spent = value == '' and amount or value
      if redis.call('HEXISTS', held, '~gone') == 1 then
        spent = tonumber(spent) - tonumber(amount)
      else
        redis.call('HINCRBY', key, 'reserved', text(0 - amount))
      end
      redis.call('HINCRBY', key, 'spent', text(tonumber(spent)))
      redis.call('HDEL', held, key)
      local rest = redis.call('HLEN', held)
      for _, own in ipairs({{'~gone', '~row', '~back'}}) do rest = rest - redis.call('HEXISTS', held, own) end
      if rest == 0 then
        redis.call('DEL', held)
        redis.call('ZREM', leases, op)
      end
      if tonumber(spent) == 0 then forget_if_unused(key) end
    elseif more ~= '' and redis.call('EXISTS', adjusted .. op .. ':' .. key) == 0 then
      redis.call('HINCRBY', key, 'spent', text(tonumber(value)))
      if tonumber(more) and redis.call('PTTL', key) == -1 then redis.call('PEXPIREAT', key, more) end
    end
    if more ~= '' then redis.call('SET', adjusted .. op .. ':' .. key, '1', 'EX', 86400) end
  end
end
return 1
"""
)

# What a worker admitted within its leases, in the order of their numbers: one that follows on a lost one is lost too.
# KEYS: how many it has noted, the leases, then of each note the operation's and the budgets. ARGV: the time, the lease,
# the worker, the first note's number ('' if it is told again), then of each the operation, what it reserves, its row,
# how many budgets.
NOTE = (
    _TIME
    + f"""
local number, mine, at = tonumber(ARGV[4]), '{LEASED}' .. ARGV[3], 3
if number and tonumber(redis.call('GET', KEYS[1]) or 0) ~= number - 1 then return 0 end
for i = 5, #ARGV, 4 do
  local op, value, row, last = ARGV[i], ARGV[i + 1], ARGV[i + 2], at + tonumber(ARGV[i + 3])
  local held = KEYS[at]
  for k = at + 1, last do
    local key = KEYS[k]
    -- not if it is heard so late that its settlement has been charged
    if redis.call('EXISTS', '{ADJUSTED}' .. op .. ':' .. key) == 0 and redis.call('HSETNX', held, key, value) == 1 then
      local part = math.min(tonumber(redis.call('HGET', mine, 'b' .. key) or 0), tonumber(value))
      if part > 0 then
        redis.call('HINCRBY', mine, 'b' .. key, text(0 - part))
        redis.call('HINCRBY', key, 'leased', text(0 - part))
      end
      redis.call('HINCRBY', key, 'reserved', value)
      redis.call('ZADD', KEYS[2], now + lease, op)
      if row ~= '' then redis.call('HSET', held, '~row', row) end
    end
  end
  at = last + 1
end
if number then redis.call('SET', KEYS[1], text(number + (#ARGV - 4) / 4 - 1), 'EX', 86400) end
return 1
"""
)

# KEYS: how many of its notes a worker was heard. Returns that.
HOW_MANY_HEARD = "return tonumber(redis.call('GET', KEYS[1]) or 0)"

# KEYS: the leases. Gives back what dead workers had leased; spends what they had reserved, or gives it back, and
# records it. Returns how many operations it found.
REAP = (
    _TIME
    + _GIVE_BACK
    + f"""
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', '{WORKERS}', '-inf', now)) do
  give_back(worker)
  redis.call('ZREM', '{WORKERS}', worker)
end
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)
for _, op in ipairs(ended) do
  redis.call('ZREM', KEYS[1], op)
  local held = '{OPERATION}' .. op
  local fields, most, row = redis.call('HGETALL', held), '0', nil
  local back = redis.call('HEXISTS', held, '~back') == 1
  for i = 1, #fields, 2 do
    local key, amount = fields[i], fields[i + 1]
    if key == '~row' then
      row = amount
    elseif key ~= '~gone' and key ~= '~back' then
      redis.call('HINCRBY', key, 'reserved', text(0 - amount))
      if back then
        redis.call('HSET', held, key, '0')
      else
        redis.call('HINCRBY', key, 'spent', amount)
      end
      if tonumber(amount) > tonumber(most) then most = amount end
    end
  end
  if #fields > 0 then
    redis.call('HSET', held, '~gone', '1')
    redis.call('EXPIRE', held, 86400)
    if row then redis.call('XADD', '{ROWS}', '*', 'op', op, 'row', row, 'abandoned', most) end
  end
end
return #ended
"""
)

# KEYS: the mover, the rows, the count of those dropped. ARGV: the asker, how long it may, how many rows.
# Returns, if the asker may have them: that count, which then begins anew, how many rows there are, and the rows.
TAKE_ROWS = """
local mover = redis.call('GET', KEYS[1])
if mover and mover ~= ARGV[1] then return {'0', 0, {}} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local dropped = redis.call('GET', KEYS[3]) or '0'
redis.call('DEL', KEYS[3])
return {dropped, redis.call('XLEN', KEYS[2]), redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', ARGV[3])}
"""

# KEYS: the mover. ARGV: who leaves.
LEAVE_ROWS = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1"
