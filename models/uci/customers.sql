-- UCI Online Retail: one row per customer number. The data has nothing else about customers; see transactions.sql.
--
-- source online_retail: online*retail*, uci*, data.csv
-- columns online_retail: Customer ID, CustomerID

SELECT DISTINCT regexp_replace(trim(coalesce(`Customer ID`, CustomerID)), '[.]0$', '') AS customer_id
FROM online_retail
WHERE trim(coalesce(`Customer ID`, CustomerID)) <> ''
